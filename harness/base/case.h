#pragma once
// A case is a line:
//   v1 qk_norm num_heads=48 num_kv_heads=8 head_dim=128 tp_size=16 num_tokens=4 dtype=bf16
//   fill=dense seed=7
// Printed, parsed, replayed, stored, deduplicated: always this line. Which keys a case has is
// declared by its operator as a list of Key; parse, print, draw, shrink and `tpcheck list` all work
// from that list.

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "harness/base/dtype.h"
#include "harness/base/fill.h"
#include "harness/base/shape.h"

namespace tp {

// One point of the space that is searched.
struct Case {
  std::string op;
  ModelShape model;
  int tp_size = 1;
  int num_tokens = 1;
  DType dtype = DType::bf16;
  Fill fill = Fill::exact;
  std::uint64_t seed = 0;                       // of the data, and of the emulator's schedule
  std::map<std::string, std::int64_t> options;  // the operator's own keys

  bool operator==(const Case&) const = default;
};

// How a failing case's value of a key is made smaller.
enum class Shrink : std::uint8_t {
  to_min,       // the minimum, then halves of the distance
  to_fallback,  // the default value, if it is another one
  never,
};

// One key of a case line: a whole number, or one of `words`.
struct Key {
  std::string name;
  std::string help;
  std::int64_t min = 0;
  std::int64_t max = 0;
  std::int64_t fallback = 0;
  std::vector<std::string> words = {};  // names of min, min+1, ...; empty: a number
  bool always = false;                  // printed even where it has its default
  Shrink shrink = Shrink::to_min;
  std::vector<int> weights = {};  // how often each word is drawn; empty: equally often
  std::int64_t draw_max = 0;      // numbers are drawn log-uniformly up to this; 0: up to max
  std::int64_t large_max = 0;     // in a large case: uniformly from draw_max up to this; 0: as ever
  std::int64_t grain = 1;         // half of the drawn numbers are multiples of this
  bool of_model = false;          // an option that a model's config decides (Operator::adopt)
  bool is_size = false;           // halved where a drawn case would be too much work
  // Decided by the user's checkpoint where the case runs on its tensors (on_checkpoint).
  bool of_checkpoint = false;
  bool is_drawn = true;  // false: only those cases have another value than the fallback
  // Whether this word is drawn beside what the keys before this one have; of numbers, whether any
  // other than the fallback is. Null: always.
  bool (*fits)(const Case&, std::int64_t value) = nullptr;
  // A field of Case shared by operators; without these two the key lives in Case::options.
  std::int64_t (*get_field)(const Case&) = nullptr;
  void (*set_field)(Case&, std::int64_t) = nullptr;

  std::int64_t get(const Case& c) const { return get_field ? get_field(c) : c.options.at(name); }
  void set(Case& c, std::int64_t value) const {
    set_field ? set_field(c, value) : void(c.options[name] = value);
  }
  std::string print(std::int64_t value) const;
  // Throws BadInput naming the key, the text, and what would have been allowed.
  std::int64_t parse(std::string_view text) const;
};

// The shared keys: hidden_size num_heads num_kv_heads head_dim v_head_dim tp_size num_tokens dtype
// fill seed.
Key shared_key(std::string_view name);

// The one line of a case.
std::string to_line(const Case& c);

// Parses and validates a line. Throws BadInput with one sentence: unknown version, operator or key,
// a key that is missing, repeated or out of range, an illegal shape.
Case case_from_line(std::string_view line);

}  // namespace tp
