#include "properties/lora_laws.h"

#include "properties/lora_user.h"

namespace tp::lora {

namespace {

// Of outputs that have a row a token; the others have no twin.
bool is_by_token(const Case& c, const TensorSpec& t) {
  const std::string& name = t.name;
  return t.rows == c.num_tokens && (name == "out" || name.ends_with("_lora"));
}
std::optional<Place> same_place(const Case& c, const Variation&, const TensorSpec& t,
                                std::int64_t row, std::int64_t col) {
  if (!is_by_token(c, t)) return std::nullopt;
  return Place{row, col};
}

}  // namespace

LawRun law_tokens() {
  LawRun law = tp::law_tokens();
  law.twin = [](const Case& c, const Variation& v, const TensorSpec& t, std::int64_t row,
                std::int64_t col) -> std::optional<Place> {
    if (!is_by_token(c, t)) return std::nullopt;
    return Place{(row + v.rotate_rows) % t.rows, col};
  };
  return law;
}

LawRun law_alpha() {
  return {.law = {"alpha", "twice the alpha and half of A (and of B's bias) give the same bits"},
          .vary =
              [](const Case& c) {
                return std::pair{c, Variation{.law = "alpha"}};
              },
          .twin = same_place,
          .refuse = [](const Case& c) -> std::optional<std::string> {
            if (is_users(c)) return "law=alpha halves A, and that is the user's";
            if (c.dtype == DType::f16 && c.fill != Fill::exact)
              return "halves of f16 numbers may be subnormal";
            return std::nullopt;
          }};
}

LawRun law_slots() {
  return {.law = {"slots", "adapters in other slots give the same bits"},
          .vary =
              [](const Case& c) {
                return std::pair{c, Variation{.law = "slots"}};
              },
          .twin = same_place};
}

LawRun law_alone() {
  return {.law = {"alone", "an adapter's tokens have the same bits where no other token has one"},
          .vary =
              [](const Case& c) {
                std::int64_t used = 0;
                for (const std::int32_t slot : slot_of_token(c, 0)) {
                  if (slot >= 0) used = slot;
                }
                return std::pair{c, Variation{.law = "alone", .argument = used}};
              },
          .twin = [](const Case& c, const Variation& v, const TensorSpec& t, std::int64_t row,
                     std::int64_t col) -> std::optional<Place> {
            if (!is_by_token(c, t) || slot_of_token(c, 0)[std::size_t(row)] != v.argument)
              return std::nullopt;
            return Place{row, col};
          }};
}

LawRun law_tp1() {
  LawRun law = tp::law_tp1();
  // Where shrunk activations differ, so may what is made of them.
  law.twin = [](const Case& c, const Variation& v, const TensorSpec& t, std::int64_t row,
                std::int64_t col) -> std::optional<Place> {
    if (t.name == "lora_h") return Place{row, col};
    return same_place(c, v, t, row, col);
  };
  law.refuse = [](const Case& c) -> std::optional<std::string> {
    const auto module = c.options.find("module");
    if (module != c.options.end() && module->second >= 2 && c.options.at("joins") == 0)
      return "ranks whose parts are rounded add up to something else than one rank has";
    return std::nullopt;
  };
  return law;
}

LawRun law_zero_b(std::function<bool(const Case&)> has_adapters) {
  return {.law = {"zero_b", "where B is zero, adapters leave the base's outputs as they are"},
          .vary =
              [](const Case& c) {
                return std::pair{c, Variation{.law = "zero_b"}};
              },
          .twin = [](const Case&, const Variation&, const TensorSpec& t, std::int64_t row,
                     std::int64_t col) -> std::optional<Place> {
            if (!t.name.ends_with("_lora")) return std::nullopt;
            return Place{row, col};
          },
          .counterpart =
              [](const std::string& tensor) { return tensor.substr(0, tensor.rfind("_lora")); },
          .refuse = [has_adapters](const Case& c) -> std::optional<std::string> {
            if (!has_adapters(c)) return "law=zero_b is about adapters, and lora=0 has none";
            // Added to zero it is a positive one.
            if (c.dtype == DType::f16 && c.fill != Fill::exact && c.fill != Fill::dense)
              return "law=zero_b: outputs of f16 may be so small that they are negative zeros";
            return std::nullopt;
          }};
}

}  // namespace tp::lora
