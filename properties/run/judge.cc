#include "properties/run/judge.h"

#include <fmt/format.h>
#include <xxhash.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <map>

#include "harness/base/check.h"
#include "properties/run/pass.h"

namespace tp {

namespace {

// A global tensor put together from the ranks' pieces, and what did not fit.
class Assembly {
 public:
  explicit Assembly(const TensorSpec& tensor)
      : tensor_(tensor),
        width_(size_of(tensor.dtype)),
        bytes_(std::size_t(tensor.rows * tensor.cols * width_)) {}

  // Rank `tp_rank` says what columns `cols` of `rows` hold. The first rank that holds a column of
  // these rows is its owner, later ones are replicas and must agree bit for bit.
  void add(int tp_rank, Shard rows, Shard cols, const std::byte* piece) {
    std::vector<int>& owner = owners_of(rows);
    for (std::int64_t j = cols.offset; j < cols.end();) {
      const bool replica = owner[std::size_t(j)] >= 0;
      std::int64_t end = j;
      while (end < cols.end() && (owner[std::size_t(end)] >= 0) == replica) ++end;
      const std::byte* from = piece + (j - cols.offset) * width_;
      for (std::int64_t i = rows.offset; i < rows.end(); ++i, from += cols.size * width_) {
        std::byte* row = bytes_.data() + (i * tensor_.cols + j) * width_;
        const std::size_t size = std::size_t((end - j) * width_);
        if (!replica) {
          std::memcpy(row, from, size);
        } else if (!replica_ && std::memcmp(row, from, size) != 0) {
          note_replica(tp_rank, i, {j, end - j}, row, from);
        }
      }
      for (; j < end; ++j) {
        if (!replica) owner[std::size_t(j)] = tp_rank;
      }
    }
  }

  // An element that no rank holds.
  std::optional<Place> orphan() const {
    std::int64_t next = 0;
    for (const Band& band : bands_) {
      if (band.rows.offset > next) break;
      const auto it = std::find(band.owner.begin(), band.owner.end(), -1);
      if (it != band.owner.end()) return Place{next, it - band.owner.begin()};
      next = band.rows.end();
    }
    if (next < tensor_.rows) return Place{next, 0};
    return std::nullopt;
  }

  const TensorSpec& tensor() const { return tensor_; }
  const std::vector<std::byte>& bytes() const { return bytes_; }
  int owner(std::int64_t row, std::int64_t col) const {
    for (const Band& band : bands_) {
      if (row >= band.rows.offset && row < band.rows.end()) return band.owner[std::size_t(col)];
    }
    return -1;
  }

  struct Replica {
    int tp_rank;
    std::int64_t row, col;
    double value;
  };
  const std::optional<Replica>& replica() const { return replica_; }

 private:
  // Rows whose columns have the same owners: all of them, or those that one rank was scattered.
  struct Band {
    Shard rows;
    std::vector<int> owner;  // of each column; -1: nobody
  };

  std::vector<int>& owners_of(Shard rows) {
    auto at = bands_.begin();
    while (at != bands_.end() && at->rows.end() <= rows.offset) ++at;
    if (at != bands_.end() && at->rows == rows) return at->owner;
    TP_CHECK(at == bands_.end() || rows.end() <= at->rows.offset,
             "pieces of " + tensor_.name + " share some of their rows only");
    return bands_.insert(at, {rows, std::vector<int>(std::size_t(tensor_.cols), -1)})->owner;
  }

  void note_replica(int tp_rank, std::int64_t row, Shard cols, const std::byte* mine,
                    const std::byte* theirs) {
    for (std::int64_t j = 0; j < cols.size; ++j) {
      if (std::memcmp(mine + j * width_, theirs + j * width_, std::size_t(width_)) == 0) continue;
      replica_ = Replica{tp_rank, row, cols.offset + j, load(tensor_.dtype, theirs, j)};
      return;
    }
  }

  const TensorSpec& tensor_;
  std::int64_t width_;
  std::vector<std::byte> bytes_;
  std::vector<Band> bands_;  // in ascending order
  std::optional<Replica> replica_;
};

Matrix matrix_of(const TensorSpec& tensor, const std::vector<std::byte>& bytes) {
  Matrix m(tensor.rows, tensor.cols);
  // Asks for the type once, not once an element.
  const auto load_as = [&]<typename T>(T) {
    for (std::size_t i = 0; i < m.values.size(); ++i)
      m.values[i] = load(dtype_of<T>::value, bytes.data(), std::int64_t(i));
  };
  switch (tensor.dtype) {
    case DType::f32:
      load_as(float{});
      break;
    case DType::f16:
      load_as(f16{});
      break;
    case DType::bf16:
      load_as(bf16{});
      break;
    case DType::e4m3:
      load_as(e4m3{});
      break;
    case DType::u8:
      load_as(std::uint8_t{});
      break;
    case DType::i32:
      load_as(std::int32_t{});
      break;
  }
  return m;
}

// The inputs that a stage's kernels really had: filled from the case, or what an earlier stage
// produced.
class StageInputs : public WholeInputs {
 public:
  StageInputs(const Stage& stage, InputData& data, const std::map<std::string, Assembly>& produced)
      : stage_(stage), data_(data), produced_(produced) {}

  const Matrix& operator[](const std::string& name) const override {
    if (const auto made = matrices_.find(name); made != matrices_.end()) return made->second;
    const TensorSpec& t = tensor_of(stage_, name);
    const auto earlier = produced_.find(name);
    return matrices_
        .emplace(name,
                 matrix_of(t, earlier == produced_.end() ? data_.block(t, {0, t.rows}, {0, t.cols})
                                                         : earlier->second.bytes()))
        .first->second;
  }

 private:
  const Stage& stage_;
  InputData& data_;
  const std::map<std::string, Assembly>& produced_;
  mutable std::map<std::string, Matrix> matrices_;
};

// How findings name a place in the outputs of a stage. Of one stage among several they say which,
// and whose column it is.
class Places {
 public:
  Places(const ModelShape& model, const std::vector<Stage>& stages, const Stage& stage)
      : model_(model), stage_(stages.size() > 1 ? &stage : nullptr) {}

  // What the sentence begins with.
  std::string stage() const { return stage_ ? fmt::format("stage {}, ", stage_->name) : ""; }

  std::string element(const TensorSpec& t, std::int64_t row, std::int64_t col) const {
    std::string text = fmt::format("{}[{}, {}]", t.name, row, col);
    const std::int64_t heads = t.cols / t.entity_cols;
    // What says nothing of its columns has as many by chance.
    const bool by_head = heads > 1 && t.entity_cols > 1 && t.cols % t.entity_cols == 0 &&
                         (heads == model_.num_heads || heads == model_.num_kv_heads);
    if (stage_ && by_head) text += fmt::format(" (token {}, head {})", row, col / t.entity_cols);
    return text;
  }

 private:
  const ModelShape& model_;
  const Stage* stage_;  // null: the only one
};

Verdict wrong_value(const Places& places, int tp_rank, const TensorSpec& tensor,
                    const Mismatch& m) {
  Verdict v;
  v.outcome =
      std::isfinite(m.got) || !std::isfinite(m.lo) ? Outcome::WrongValue : Outcome::NotFinite;
  v.detail =
      fmt::format("{}tp_rank {}, {}: got {:.9g}, accepted {:.9g} .. {:.9g} ({} of {} elements)",
                  places.stage(), tp_rank, places.element(tensor, m.row, m.col), m.got, m.lo, m.hi,
                  m.count, tensor.rows * tensor.cols);
  return v;
}

// A replica that differs from its owner, who is within the budget: wrong by itself, or only
// different.
Verdict wrong_replica(const Places& places, const Assembly& got, const Budget& budget) {
  const Assembly::Replica& replica = *got.replica();
  const TensorSpec& t = got.tensor();
  const std::size_t at = std::size_t(replica.row * t.cols + replica.col);
  Budget one(1, 1);
  one.r[0] = budget.r[at];
  one.rho[0] = budget.rho[at];
  alignas(8) std::byte bytes[8];
  store(t.dtype, bytes, 0, replica.value);
  if (auto first = compare(t.dtype, bytes, one).first) {
    first->row = replica.row;
    first->col = replica.col;
    return wrong_value(places, replica.tp_rank, t, *first);
  }
  Verdict v{.outcome = Outcome::ReplicaMismatch};
  v.detail = fmt::format(
      "{}{}: tp_rank {} has {:.9g}, its replica on tp_rank {} has {:.9g}", places.stage(),
      places.element(t, replica.row, replica.col), got.owner(replica.row, replica.col),
      load(t.dtype, got.bytes().data(), std::int64_t(at)), replica.tp_rank, replica.value);
  return v;
}

// Data that are made to show mistakes, and so are mistrusted where they could not: all of
// attention's own kinds are.
bool telling(Fill fill) {
  return fill == Fill::exact || fill == Fill::dense || int(fill) >= kPlainFills;
}

}  // namespace

Judgement judge(const Case& c, const std::vector<Stage>& stages, InputData& data,
                const std::vector<std::byte>& outputs, bool discriminate) {
  Judgement result;
  XXH3_state_t* hash = XXH3_createState();
  XXH3_64bits_reset(hash);

  std::map<std::string, Assembly> assemblies;
  for (const Stage& stage : stages) {
    for (const TensorSpec& t : stage.outputs) assemblies.emplace(t.name, t);
  }
  std::size_t at = 0;
  for (int r = 0; r < c.tp_size; ++r) {
    for (const Stage& stage : stages) {
      for (const LocalBuffer& local : stage.buffers(r)) {
        if (local.use != Use::output) continue;
        for (const Piece& piece : local.pieces) {
          TP_CHECK(at + piece_bytes(local, piece) <= outputs.size(),
                   "gathered outputs are too short");
          assemblies.at(piece.tensor)
              .add(r, rows_of(stage, piece), piece.cols, outputs.data() + at);
          at += piece_bytes(local, piece);
        }
      }
    }
  }
  TP_CHECK(at == outputs.size(), "gathered outputs are too long");

  // Stage-local: each stage is judged with the inputs its kernels really had, up to the first bad
  // one, which is named.
  for (const Stage& stage : stages) {
    if (result.finding) {
      // Its inputs may be anything: what memory held, sizes among it.
      for (const TensorSpec& t : stage.outputs) {
        const std::vector<std::byte>& bytes = assemblies.at(t.name).bytes();
        result.rhos.emplace_back();
        XXH3_64bits_update(hash, bytes.data(), bytes.size());
      }
      continue;
    }
    const StageInputs inputs(stage, data, assemblies);
    const Places places(c.model, stages, stage);
    const auto start = std::chrono::steady_clock::now();
    std::vector<Budget> budgets = stage.reference(inputs);
    result.reference_seconds +=
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    for (std::size_t i = 0; i < stage.outputs.size(); ++i) {
      Assembly& got = assemblies.at(stage.outputs[i].name);
      const TensorSpec& t = stage.outputs[i];
      const Comparison comparison = compare(t.dtype, got.bytes().data(), budgets[i]);
      result.score = std::max(result.score, comparison.score);
      const std::int64_t elements = t.rows * t.cols;
      if (100 * comparison.unchecked > elements && !result.blind_to) {
        result.blind_to = fmt::format(
            "what becomes of {} of {} elements of {}: they may overflow on "
            "the way",
            comparison.unchecked, elements, t.name);
      }
      if (const auto orphan = got.orphan(); orphan && !result.finding) {
        result.finding =
            Verdict{.outcome = Outcome::WrongValue,
                    .detail = fmt::format("{}no rank holds {}", places.stage(),
                                          places.element(t, orphan->row, orphan->col))};
      }
      if (comparison.first && !result.finding) {
        result.finding = wrong_value(
            places, got.owner(comparison.first->row, comparison.first->col), t, *comparison.first);
      }
      if (got.replica() && !result.finding) result.finding = wrong_replica(places, got, budgets[i]);
      const std::vector<double>& rho = budgets[i].rho;
      result.own_bits |=
          stage.own_bits && std::any_of(rho.begin(), rho.end(), [](double r) { return r != 0; });
      XXH3_64bits_update(hash, got.bytes().data(), got.bytes().size());
    }
    if (discriminate && telling(data.regime().fill) && stage.blind_to && !result.blind_to)
      result.blind_to = stage.blind_to(inputs, budgets);
    for (std::size_t i = 0; i < stage.outputs.size(); ++i)
      result.rhos.push_back(std::move(budgets[i].rho));
  }
  for (std::size_t i = 0; i < stages.size(); ++i) {
    for (const TensorSpec& t : stages[i].outputs)
      result.outputs.push_back({t, i, assemblies.at(t.name).bytes(), stages[i].bits_by_size});
  }
  result.digest = XXH3_64bits_digest(hash);
  XXH3_freeState(hash);
  return result;
}

}  // namespace tp
