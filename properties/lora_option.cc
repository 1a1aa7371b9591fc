#include "properties/lora_option.h"

#include <memory>

#include "harness/base/operator.h"
#include "properties/lora_stages.h"

namespace tp::lora {

namespace {

constexpr const char* kAdapters[] = {"0", "1", "2", "3", "4"};

// Whether a token of a case with one adapter uses it. The case that was asked about last is kept:
// twins ask element by element.
bool uses_adapter(const Case& c, std::int64_t token) {
  struct Known {
    std::uint64_t seed = 0;
    std::vector<std::int32_t> slot_of;
  };
  thread_local Known known;
  if (known.seed != c.seed || std::int64_t(known.slot_of.size()) != c.num_tokens)
    known = {c.seed, slot_of_token(as_lora(c, Base::qkv), 0)};
  return known.slot_of[std::size_t(token)] >= 0;
}

bool with_adapters_only(const Case& c, std::int64_t) { return has_adapters(c); }

}  // namespace

std::vector<Key> option_keys(bool (*fits)(const Case&, std::int64_t adapters)) {
  return {{.name = "lora",
           .help = "LoRA adapters over the layer",
           .min = 0,
           .max = 4,
           .words = {std::begin(kAdapters), std::end(kAdapters)},
           .weights = {76, 8, 8, 4, 4},
           .fits = fits},
          {.name = "lora_rank",
           .help = "LoRA ranks that a slot has room for",
           .min = 1,
           .max = 512,
           .fallback = 8,
           .draw_max = 24,
           .fits = with_adapters_only}};
}

bool has_adapters(const Case& c) {
  const auto key = c.options.find("lora");
  return key != c.options.end() && key->second > 0;
}

bool fits_gather(const Case& c, std::int64_t adapters) {
  return adapters == 0 || c.options.at("gather") == 0;
}

std::vector<Stage> followed_by(std::vector<Stage> stages, std::vector<Stage> more) {
  for (Stage& stage : more) stages.push_back(std::move(stage));
  return stages;
}

double work(const Case& lora_case) { return work(lora_case, layer_of(lora_case)); }

Case as_lora(const Case& c, Base base, std::map<std::string, std::int64_t> options) {
  Case lora = c;
  lora.op = "lora";
  lora.options = find_operator(lora.op).blank().options;
  options.insert({{"module", std::int64_t(base)},
                  {"adapters", c.options.at("lora")},
                  {"max_rank", c.options.at("lora_rank")},
                  {"ranks", 1},
                  {"segments", 2},
                  {"pad", c.options.at("pad")}});
  for (const auto& [key, value] : options) lora.options.at(key) = value;
  return lora;
}

std::optional<std::string> refuse_option(const Case& c, const Case& lora_case) {
  const auto gathers = c.options.find("gather");
  if (gathers != c.options.end() && gathers->second == 1)
    return "adapters take activations as they are, and gather=1 gives ranks the codes of most";
  return refuse(lora_case, layer_of(lora_case));
}

LawRun with_adapters(LawRun law) {
  law.twin = [twin = law.twin](const Case& c, const Variation& v, const TensorSpec& t,
                               std::int64_t row, std::int64_t col) -> std::optional<Place> {
    if (t.name.starts_with("partial")) return std::nullopt;
    if (t.name == "lora_h") {  // matrix by matrix, token by token
      const std::int64_t token = row % c.num_tokens;
      return Place{row - token + (token + v.rotate_rows) % c.num_tokens, col};
    }
    if (!twin) return Place{row, col};
    constexpr std::string_view kEnd = "_lora";
    if (!t.name.ends_with(kEnd)) return twin(c, v, t, row, col);
    // An output has a twin where what it was made of has one.
    TensorSpec base = t;
    base.name.resize(t.name.size() - kEnd.size());
    return twin(c, v, base, row, col);
  };
  return law;
}

TensorSpec merged(TensorSpec w, const Case& c, std::size_t part) {
  struct Sum {
    std::uint64_t seed = 0;
    Matrix values{0, 0};
  };
  const Layer layer = layer_of(c);
  const auto filled = [](const TensorSpec& t, const DataRegime& g) {
    std::vector<float> block(std::size_t(t.rows * t.cols));
    fill_block(t, g, {0, t.rows}, {0, t.cols}, block.data(), t.cols);
    Matrix m(t.rows, t.cols);
    std::copy(block.begin(), block.end(), m.values.begin());
    return m;
  };
  const TensorSpec plain = w;
  w.drawn = {};
  // The data of a regime are made when the first element is asked for.
  w.value = [=, sum = std::make_shared<Sum>()](const DataRegime& g, std::int64_t row,
                                               std::int64_t col) {
    if (sum->values.rows == 0 || sum->seed != g.seed) {
      const auto [a, b, scale] = first_delta(c, layer, part);
      const Matrix of_a = filled(a, g), of_b = filled(b, g);
      *sum = {g.seed, filled(plain, g)};
      for (std::int64_t i = 0; i < of_b.rows; ++i) {
        for (std::int64_t r = 0; r < of_a.rows; ++r) {
          const double factor = scale * of_b.row(i)[r];
          for (std::int64_t k = 0; k < of_a.cols; ++k)
            sum->values.row(i)[k] += factor * of_a.row(r)[k];
        }
      }
    }
    return sum->values.row(row)[col];
  };
  return w;
}

LawRun law_merged() {
  return {.law = {"merged",
                  "weights that the adapter was merged into make of exact data what base and "
                  "adapter make"},
          .vary =
              [](const Case& c) {
                return std::pair{c, Variation{.law = "merged"}};
              },
          .twin = [](const Case& c, const Variation&, const TensorSpec& t, std::int64_t row,
                     std::int64_t col) -> std::optional<Place> {
            if (!t.name.ends_with("_lora") || !uses_adapter(c, row)) return std::nullopt;
            return Place{row, col};
          },
          .refuse = [](const Case& c) -> std::optional<std::string> {
            if (c.options.at("lora") == 1 && c.dtype == DType::f32 && c.fill == Fill::exact &&
                c.options.at("weights") == 0)
              return std::nullopt;
            return "law=merged needs lora=1, dtype=f32, fill=exact and weights=given: one adapter, "
                   "and sums that are not rounded";
          }};
}

}  // namespace tp::lora
