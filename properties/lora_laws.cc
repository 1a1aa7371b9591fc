#include "properties/lora_laws.h"

#include <array>
#include <memory>

#include "properties/lora_layers.h"
#include "properties/lora_user.h"

namespace tp::lora {

namespace {

// Of outputs that have a row a token.
bool is_by_token(const Case& c, const TensorSpec& t) {
  const std::string& name = t.name;
  return t.rows == c.num_tokens && (name == "out" || name.ends_with("_lora"));
}
std::optional<Place> same_place(const Case& c, const Variation&, const TensorSpec& t,
                                std::int64_t row, std::int64_t col) {
  if (!is_by_token(c, t)) return std::nullopt;
  return Place{row, col};
}

// Where the element of lora_h is that stands to token `other(token)` as this one to its own;
// nothing if there is no such token.
template <typename Other>
std::optional<Place> of_other_token(const Case& c, const TensorSpec& h, std::int64_t row,
                                    std::int64_t col, Other other) {
  const std::int64_t tokens = c.num_tokens;
  const bool has_own_parts = is_partial(c) && !shares_out_rank(c);
  // Elements from a token to the next one, in rows or in columns.
  const bool in_columns = layout(c) == Layout::ranks;
  const std::int64_t step =
      layout(c) == Layout::tokens ? h.rows / (tokens * (has_own_parts ? c.tp_size : 1)) : 1;
  const std::int64_t token = (in_columns ? col : row) / step % tokens;
  const std::optional<std::int64_t> to = other(token);
  if (!to) return std::nullopt;
  const std::int64_t move = (*to - token) * step;
  return in_columns ? Place{row, col + move} : Place{row + move, col};
}

// The place of another token's element, of the outputs that have elements of tokens: what comes of
// the layer, and the shrunk activations, whose bits the sum with the base may hide.
template <typename Other>
std::optional<Place> of_token(const Case& c, const TensorSpec& t, std::int64_t row,
                              std::int64_t col, Other other) {
  if (t.name == "lora_h") return of_other_token(c, t, row, col, other);
  if (!is_by_token(c, t)) return std::nullopt;
  const std::optional<std::int64_t> to = other(row);
  if (!to) return std::nullopt;
  return Place{*to, col};
}

std::optional<Place> same_token(const Case& c, const Variation&, const TensorSpec& t,
                                std::int64_t row, std::int64_t col) {
  return of_token(c, t, row, col, [](std::int64_t token) { return std::optional(token); });
}

// slot_of_token() of the case that was asked about last: twins ask element by element.
class SlotOfToken {
 public:
  std::int32_t operator()(const Case& c, std::int64_t token) {
    const Key key{std::int64_t(c.seed), c.num_tokens, slots(c), c.options.at("segments")};
    if (of_.empty() || key != key_) {
      of_ = slot_of_token(c, 0);
      key_ = key;
    }
    return of_[std::size_t(token)];
  }

 private:
  using Key = std::array<std::int64_t, 4>;  // what it depends on
  Key key_{};
  std::vector<std::int32_t> of_;
};

// The adapter of the last token that has one.
std::int64_t last_used(const Case& c) {
  std::int64_t used = 0;
  for (const std::int32_t slot : slot_of_token(c, 0)) {
    if (slot >= 0) used = slot;
  }
  return used;
}

// Twins of the tokens that use adapter Variation::argument.
auto twin_of_users() {
  return [slot_of = std::make_shared<SlotOfToken>()](const Case& c, const Variation& v,
                                                     const TensorSpec& t, std::int64_t row,
                                                     std::int64_t col) {
    return of_token(c, t, row, col, [&](std::int64_t token) {
      return (*slot_of)(c, token) == v.argument ? std::optional(token) : std::nullopt;
    });
  };
}

}  // namespace

LawRun law_tokens() {
  LawRun law = tp::law_tokens();
  law.twin = [](const Case& c, const Variation& v, const TensorSpec& t, std::int64_t row,
                std::int64_t col) {
    return of_token(c, t, row, col, [&](std::int64_t token) {
      return std::optional((token + v.rotate_rows) % c.num_tokens);
    });
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
          .twin = same_token};
}

LawRun law_alone() {
  return {.law = {"alone", "an adapter's tokens have the same bits where no other token has one"},
          .vary =
              [](const Case& c) {
                return std::pair{c, Variation{.law = "alone", .argument = last_used(c)}};
              },
          .twin = twin_of_users()};
}

LawRun law_tp1() {
  LawRun law = tp::law_tp1();
  // Shrunk activations of ranks that round parts of them differ within their budget, and what comes
  // of them with them; ranks that have parts of their own have no twin.
  law.twin = [](const Case& c, const Variation& v, const TensorSpec& t, std::int64_t row,
                std::int64_t col) -> std::optional<Place> {
    if (is_partial(c) && t.name != "out") return std::nullopt;
    return same_token(c, v, t, row, col);
  };
  law.refuse = [](const Case& c) -> std::optional<std::string> {
    const bool is_exact =
        c.fill == Fill::exact && c.dtype == DType::f32 && c.options.at("rslora") == 0;
    if (!is_partial(c) || is_exact) return std::nullopt;
    return "law=tp1: ranks whose parts are rounded add up to something else than one rank has";
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
