#include "harness/fuzz/domain.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "harness/base/check.h"
#include "harness/base/user_adapter.h"

namespace tp {

namespace {

bool has_mutant(const Operator& op, const std::string& id) {
  return std::any_of(op.mutants.begin(), op.mutants.end(),
                     [&](const Mutant& m) { return m.id == id; });
}

void choose_ops(Domain& domain, const std::vector<std::string>& names) {
  if (names.empty()) {
    for (const Operator& op : operators()) domain.ops.push_back(&op);
  }
  for (const std::string& name : names) {
    const Operator* op = &find_operator(name);
    if (std::find(domain.ops.begin(), domain.ops.end(), op) == domain.ops.end())
      domain.ops.push_back(op);
  }
  if (domain.mutant.empty()) return;
  find_mutant(domain.mutant);
  std::erase_if(domain.ops, [&](const Operator* op) { return !has_mutant(*op, domain.mutant); });
  if (domain.ops.empty()) {
    throw BadInput(
        fmt::format("none of {} has the mutant '{}'", fmt::join(names, ", "), domain.mutant));
  }
}

// Leaves those that run adapters.
void keep_ops_of_adapters(Domain& domain, const std::vector<std::string>& names) {
  for (const std::string& name : names) {
    if (!find_operator(name).adapter_cases)
      throw BadInput(fmt::format("{} runs no adapter (--adapter)", name));
  }
  std::erase_if(domain.ops, [](const Operator* op) { return !op->adapter_cases; });
  if (domain.ops.empty()) throw BadInput("there is no operator that runs an adapter (--adapter)");
}

bool has_model(const std::vector<Model>& all, const std::string& id) {
  return std::any_of(all.begin(), all.end(), [&](const Model& m) { return m.id == id; });
}

void add_model(Domain& domain, const Model& model) {
  check_known(model);
  if (!model.checkpoint.empty()) {
    if (!domain.checkpoint.empty() && domain.checkpoint != model.checkpoint) {
      throw BadInput(fmt::format("one checkpoint at a time, not both {} and {}", domain.checkpoint,
                                 model.checkpoint));
    }
    domain.checkpoint = model.checkpoint;
  }
  domain.models.push_back(model);
}

// The cases on the model's own tensors; nullptr: there are none.
const std::vector<Case>* own_cases(const Domain& domain, const Model& model, std::size_t op,
                                   int tp_size) {
  const bool has_files = !model.checkpoint.empty() || !domain.adapter.empty();
  if (!has_files || domain.on_checkpoint.empty()) return nullptr;
  const auto at = domain.on_checkpoint[op].find(tp_size);
  return at == domain.on_checkpoint[op].end() ? nullptr : &at->second;
}

void check_models_fit(const Domain& domain) {
  std::string reason;
  for (const Model& model : domain.models) {
    for (const int tp : domain.tp_sizes) {
      const auto why = partitionable(model.shape, tp);
      if (!why) return;
      reason = fmt::format("{}: {}", model.id, *why);
    }
  }
  throw BadInput(fmt::format("no model fits any of the tp sizes ({})", reason));
}

}  // namespace

bool is_legal(const HeadTriple& t) {
  const ModelShape shape{.num_heads = t.num_heads, .num_kv_heads = t.num_kv_heads};
  return !partitionable(shape, t.tp_size);
}

Relation relation_of(const HeadTriple& t) {
  if (t.tp_size == 1) return Relation::single;
  if (t.num_kv_heads < t.tp_size) return Relation::below;
  return t.num_kv_heads == t.tp_size ? Relation::equal : Relation::above;
}

bool has_heads(const Operator& op) {
  return op.key("num_heads") && op.key("num_kv_heads") && op.key("tp_size");
}

HeadTriple heads_of(const Case& c) { return {c.model.num_heads, c.model.num_kv_heads, c.tp_size}; }

void set_heads(Case& c, const HeadTriple& t) {
  c.model.num_heads = t.num_heads;
  c.model.num_kv_heads = t.num_kv_heads;
  c.tp_size = t.tp_size;
}

Domain make_domain(const std::vector<std::string>& ops, const std::vector<int>& tp_sizes,
                   const std::vector<std::string>& models_wanted, const std::string& mutant,
                   const std::string& adapter) {
  Domain domain;
  domain.tp_sizes = tp_sizes;
  domain.mutant = mutant;
  domain.adapter = adapter;
  choose_ops(domain, ops);
  if (!adapter.empty()) {
    if (models_wanted.size() != 1) throw BadInput(std::string(kAdapterNeedsModel));
    keep_ops_of_adapters(domain, ops);
  }
  std::sort(domain.tp_sizes.begin(), domain.tp_sizes.end());
  domain.tp_sizes.erase(std::unique(domain.tp_sizes.begin(), domain.tp_sizes.end()),
                        domain.tp_sizes.end());
  TP_CHECK(!domain.tp_sizes.empty(), "no tp_size to draw");
  const Key tp_key = shared_key("tp_size");
  if (domain.tp_sizes.front() < tp_key.min || domain.tp_sizes.back() > tp_key.max) {
    throw BadInput(fmt::format("tp sizes {} .. {} are not within {} .. {}", domain.tp_sizes.front(),
                               domain.tp_sizes.back(), tp_key.min, tp_key.max));
  }
  domain.models_only = !models_wanted.empty();
  bool all = models_wanted.empty();
  for (const std::string& name : models_wanted) {
    if (name == "all") {
      all = true;
    } else {
      add_model(domain, find_model(name));
    }
  }
  for (const Model& model : models()) {
    if (all && !has_model(domain.models, model.id)) domain.models.push_back(model);
  }
  if (domain.models_only) check_models_fit(domain);
  return domain;
}

bool on_checkpoint(const Case& c) {
  const auto layer = c.options.find("layer");
  return layer != c.options.end() && layer->second > 0;
}

CheckpointCases cases_on_files(const Operator& op, int tp_size) {
  return user_adapter() ? op.adapter_cases(tp_size) : op.checkpoint_cases(tp_size);
}

std::vector<std::string> add_checkpoint_cases(Domain& domain) {
  const bool of_adapter = user_adapter() != nullptr;
  std::vector<std::string> without;
  domain.on_checkpoint.assign(domain.ops.size(), {});
  for (std::size_t i = 0; i < domain.ops.size(); ++i) {
    const Operator& op = *domain.ops[i];
    if (!(of_adapter ? op.adapter_cases : op.checkpoint_cases)) continue;
    if (!of_adapter) op.check_checkpoint();
    std::string why;
    for (const int tp : domain.tp_sizes) {
      CheckpointCases at = cases_on_files(op, tp);
      if (why.empty()) why = at.left_out;
      if (!at.cases.empty()) domain.on_checkpoint[i].emplace(tp, std::move(at.cases));
    }
    if (domain.on_checkpoint[i].empty())
      without.push_back(fmt::format("{} runs on none of its tensors: {}", op.name, why));
  }
  const auto none = [](const auto& cases) { return cases.empty(); };
  if (of_adapter && std::all_of(domain.on_checkpoint.begin(), domain.on_checkpoint.end(), none))
    throw BadInput(fmt::format("{}: {}", domain.adapter, fmt::join(without, "; ")));
  return without;
}

void set_model(Case& c, const Model& model) {
  Case source;
  source.model = model.shape;
  for (const Key& key : find_operator(c.op).keys) {
    for (const char* name :
         {"hidden_size", "num_heads", "num_kv_heads", "head_dim", "v_head_dim"}) {
      if (key.name == name && key.get_field) key.set(c, key.get(source));
    }
  }
  if (find_operator(c.op).adopt) find_operator(c.op).adopt(c, model);
}

EachPair each_pair(const Domain& domain) {
  EachPair each;
  for (const Model& model : domain.models) {
    for (const int tp : domain.tp_sizes) {
      // A tp_size that does not divide the query heads is nobody's wish; one that does, but does
      // not fit the KV heads, is what a user tries and must be told about.
      if (model.shape.num_heads % tp != 0) continue;
      if (partitionable(model.shape, tp)) {
        ++each.refused;
        continue;
      }
      ++each.legal;
      for (std::size_t i = 0; i < domain.ops.size(); ++i) {
        if (const std::vector<Case>* own = own_cases(domain, model, i, tp)) {
          // Another layer for each pair.
          each.cases.push_back((*own)[std::size_t(each.legal) % own->size()]);
          continue;
        }
        Case c = domain.ops[i]->blank();
        c.tp_size = tp;
        set_model(c, model);
        each.cases.push_back(c);
      }
    }
  }
  return each;
}

}  // namespace tp
