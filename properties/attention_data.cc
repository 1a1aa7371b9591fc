#include "properties/attention_data.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <memory>
#include <optional>

#include "harness/base/check.h"
#include "harness/base/philox.h"

namespace tp {

namespace {

constexpr std::uint64_t kCodes = stream_of("attention codes"),
                        kTargets = stream_of("attention targets"),
                        kTemptations = stream_of("attention temptations"),
                        kNoise = stream_of("attention noise");

// Key `position` of a sequence is number sequence * kPositions + position: also beyond the
// sequence's length, where the slots of its last page are. Slots of nobody come after all of them.
constexpr std::int64_t kPositions = 1 << 20, kNobody = kPositions * kPositions;

// The same on all machines: a fraction of 23 bits in [0, 1).
double fraction_of(std::uint32_t bits) { return double(bits & 0x7FFFFFu) * 0x1p-23; }
double sign_of(std::uint32_t bits) { return bits >> 31 ? -1.0 : 1.0; }

// A query of one head: what it sees, of which sequence.
struct Query {
  std::int64_t sequence = 0, index = 0;
  Shard visible;  // positions
};

class Layout {
 public:
  explicit Layout(const AttentionData& data)
      : data(data),
        group(div_exact(data.model.num_heads, data.model.num_kv_heads)),
        key_of_slot(std::size_t(data.slots), -1),
        queries_(std::size_t(data.tokens)) {
    for (std::size_t s = 0; s < data.sequences.size(); ++s) {
      const Sequence& sequence = data.sequences[s];
      const std::int64_t keys = std::int64_t(sequence.keys.size());
      for (std::int64_t j = 0; j < keys; ++j) {
        std::int64_t& key = key_of_slot[std::size_t(sequence.keys[std::size_t(j)])];
        if (key < 0) key = std::int64_t(s) * kPositions + j;  // a shared one is its first owner's
      }
      for (std::int64_t i = 0; i < sequence.queries.size; ++i) {
        queries_[std::size_t(sequence.queries.offset + i)] = {
            std::int64_t(s), i, data.mask.visible(sequence.position_of(i), keys)};
      }
    }
    owned_ = key_of_slot;
    for (std::size_t s = 0; s < data.sequences.size(); ++s) continue_page(std::int64_t(s));
    for (std::size_t slot = 0; slot < key_of_slot.size(); ++slot) {
      if (key_of_slot[slot] < 0) key_of_slot[slot] = kNobody + std::int64_t(slot);
    }
  }

  bool stale(std::int64_t slot) const { return owned_[std::size_t(slot)] < 0; }
  std::int64_t kv_head_of(std::int64_t head) const { return head / group; }
  const Query& query(std::int64_t token) const { return queries_[std::size_t(token)]; }

  // Number of a sequence's key; where it has none at that position, of the one that would be next.
  std::int64_t key_at(std::int64_t sequence, std::int64_t position) const {
    const Sequence& s = data.sequences[std::size_t(sequence)];
    if (position >= 0 && position < std::int64_t(s.keys.size()))
      return key_of_slot[std::size_t(s.keys[std::size_t(position)])];
    return sequence * kPositions + std::max<std::int64_t>(0, position);
  }

  // +-1, coordinate c of a key's code.
  double code(std::uint64_t seed, std::int64_t key, std::int64_t kv_head, std::int64_t c) const {
    const std::int64_t blocks = (data.model.head_dim + 127) / 128;
    const std::int64_t block = (key * data.model.num_kv_heads + kv_head) * blocks + c / 128;
    const Random4& bits = code_(seed, kCodes, std::uint64_t(block));
    return bits[std::size_t(c % 128 / 32)] >> (c % 32) & 1 ? 1.0 : -1.0;
  }

  // The key that a query of one_hot finds: at the ends of what it sees, on either side of an edge
  // of a page or tile, or drawn. Neighbouring rows and heads take turns.
  std::int64_t target(std::uint64_t seed, std::int64_t token, std::int64_t head) const {
    const Query& q = query(token);
    if (q.visible.size == 0) return key_at(q.sequence, q.visible.offset);
    const Random4& r =
        target_(seed, kTargets, std::uint64_t(token * data.model.num_heads + head) + 1);
    std::int64_t at = q.visible.offset + std::int64_t(r[0] % std::uint64_t(q.visible.size));
    const std::uint64_t turn = std::uint64_t(token + head) + turn_(seed, kTargets, 0)[0];
    switch (turn % 8) {
      case 0:
        at = q.visible.offset;
        break;
      case 1:
        at = q.visible.end() - 1;
        break;
      case 2:
      case 3:
        at = edge(q.visible, data.page_size, r[1]).value_or(at + turn % 2) - std::int64_t(turn % 2);
        break;
      case 4:
      case 5:
        at = edge(q.visible, data.kv_tile, r[1]).value_or(at + turn % 2) - std::int64_t(turn % 2);
        break;
      default:
        break;
    }
    return key_at(q.sequence, at);
  }

  // The keys that a query of tripwire listens to.
  std::vector<std::int64_t> watched(std::uint64_t seed, std::int64_t token,
                                    std::int64_t head) const {
    const Query& q = query(token);
    const Shard& v = q.visible;
    std::vector<std::int64_t> positions = {v.end()};  // maybe the next forbidden one alone
    if (v.offset > 0) positions.push_back(v.offset - 1);
    if (v.size > 0) {
      const std::uint64_t row = std::uint64_t(token * data.model.num_heads + head) + 1;
      const Random4 r = philox(seed, kTargets, 2 * row), more = philox(seed, kTargets, 2 * row + 1);
      positions.push_back(v.offset);
      positions.push_back(v.end() - 1);
      for (const std::uint32_t bits : r)
        positions.push_back(v.offset + std::int64_t(bits % std::uint64_t(v.size)));
      for (const auto& at : {edge(v, data.page_size, more[0]), edge(v, data.kv_tile, more[1])}) {
        if (!at) continue;
        positions.push_back(*at - 1);
        positions.push_back(*at);
      }
    }
    std::sort(positions.begin(), positions.end());
    positions.erase(std::unique(positions.begin(), positions.end()), positions.end());
    for (std::int64_t& position : positions) position = key_at(q.sequence, position);
    return positions;
  }

  // The sum of their codes, a coordinate each.
  const std::vector<double>& heard(std::uint64_t seed, std::int64_t token,
                                   std::int64_t head) const {
    const std::array asked{std::int64_t(seed), token, head};
    if (heard_by_ == asked) return heard_;
    heard_by_ = asked;
    heard_.assign(std::size_t(data.model.head_dim), 0);
    for (const std::int64_t key : watched(seed, token, head)) {
      for (std::size_t c = 0; c < heard_.size(); ++c)
        heard_[c] += code(seed, key, kv_head_of(head), std::int64_t(c));
    }
    return heard_;
  }

  // The query of `kv_head` that a stale slot shall tempt: of the sequence whose page it ends, or of
  // any.
  struct Tempted {
    std::int64_t token, head;
  };
  std::optional<Tempted> tempted(std::uint64_t seed, std::int64_t slot,
                                 std::int64_t kv_head) const {
    if (data.sequences.empty()) return std::nullopt;
    const Random4& r =
        temptation_(seed, kTemptations, std::uint64_t(slot * data.model.num_kv_heads + kv_head));
    std::int64_t sequence = key_of_slot[std::size_t(slot)] / kPositions;
    if (key_of_slot[std::size_t(slot)] >= kNobody)
      sequence = std::int64_t(r[0] % data.sequences.size());
    const Shard& queries = data.sequences[std::size_t(sequence)].queries;
    if (queries.size == 0) return std::nullopt;
    return Tempted{queries.offset + std::int64_t(r[1] % std::uint64_t(queries.size)),
                   kv_head * group + std::int64_t(r[2] % std::uint64_t(group))};
  }

  const AttentionData data;
  const std::int64_t group;
  std::vector<std::int64_t> key_of_slot;

 private:
  // A position in the middle of `visible` at which a run of `step` positions begins.
  static std::optional<std::int64_t> edge(Shard visible, std::int64_t step, std::uint32_t random) {
    if (step <= 0) return std::nullopt;
    const std::int64_t first = visible.offset / step + 1, last = (visible.end() - 1) / step;
    if (first > last) return std::nullopt;
    return (first + std::int64_t(random % std::uint64_t(last - first + 1))) * step;
  }

  // The rest of a sequence's last page, or the slots up to the next one that is owned.
  void continue_page(std::int64_t s) {
    const std::vector<std::int64_t>& keys = data.sequences[std::size_t(s)].keys;
    if (keys.empty()) return;
    for (std::int64_t i = 0, slot = keys.back() + 1; slot < data.slots; ++i, ++slot) {
      if (data.page_size > 0 && slot % data.page_size == 0) return;
      if (key_of_slot[std::size_t(slot)] >= 0) return;
      key_of_slot[std::size_t(slot)] = s * kPositions + std::int64_t(keys.size()) + i;
    }
  }

  std::vector<std::int64_t> owned_;
  std::vector<Query> queries_;
  // What the element before was made of: all of a head have it in common.
  mutable LastPhilox code_, target_, turn_, temptation_;
  mutable std::array<std::int64_t, 3> heard_by_{-1, -1, -1};  // seed, token, head
  mutable std::vector<double> heard_;
};

// The codes of one_hot, in powers of two. Two codes that differ in one coordinate are 11 apart in
// score; coordinate 0 is the same in all keys and pushes every score below 0, so that a key of
// zeros would win.
struct OneHot {
  double size;  // of q's coordinates
  double push;  // q's coordinate 0, where keys have 8

  explicit OneHot(const AttentionData& d) {
    const double dims = std::bit_ceil(std::uint64_t(d.model.head_dim));
    size = 1;
    while (2 * size * d.scale < 11 && size * dims < 0x1p17) size *= 2;  // in the range of f16
    push = -size * dims * (3.0 / 16);
    // Within what tanh lets through: the target a quarter of the cap below 0.
    if (d.softcap > 0)
      push = -(size * double(d.model.head_dim - 1) + d.softcap / (4 * d.scale)) / 8;
  }
};

// Score of the watched keys of tripwire: ln(n + 1) + 1 in binades, so that they weigh as much as
// the n others, and at most what bf16 resolves.
double tripwire_score(const AttentionData& d, std::int64_t visible) {
  const double wanted = 0.7 * double(std::bit_width(std::uint64_t(visible))) + 1;
  return std::min(wanted, 1.2 * std::sqrt(double(d.model.head_dim)));
}

// +-1 .. +-127.
double integer_of(std::uint32_t bits) {
  return sign_of(bits) * double(1 + (bits & 0xFFFFFFu) % 127);
}

bool plain(Fill fill) { return int(fill) < kPlainFills; }

}  // namespace

TensorSpec attention_q(DType dtype, const AttentionData& data) {
  const std::int64_t dim = data.model.head_dim;
  TensorSpec t{"q", dtype, data.tokens, data.model.num_heads * dim, Role::activation, dim};
  if (plain(data.fill)) return t;
  const auto layout = std::make_shared<const Layout>(data);
  if (data.fill == Fill::ties) {
    t.value = [](const DataRegime&, std::int64_t, std::int64_t) { return 0.0; };
  } else if (data.fill == Fill::one_hot) {
    t.value = [layout, dim, codes = OneHot(data)](const DataRegime& g, std::int64_t row,
                                                  std::int64_t col) {
      const std::int64_t head = col / dim, c = col % dim;
      if (c == 0) return codes.push;
      return codes.size *
             layout->code(g.seed, layout->target(g.seed, row, head), layout->kv_head_of(head), c);
    };
  } else {
    t.value = [layout, dim](const DataRegime& g, std::int64_t row, std::int64_t col) {
      const AttentionData& d = layout->data;
      const std::int64_t head = col / dim, c = col % dim;
      const double size =
          tripwire_score(d, layout->query(row).visible.size) / (double(dim) * d.scale);
      const double sum = layout->heard(g.seed, row, head)[std::size_t(c)];
      const std::uint32_t bits =
          philox(g.seed, kNoise, std::uint64_t(row * d.model.num_heads * dim + col))[0];
      return size * (sum + 0.1 * sign_of(bits) * fraction_of(bits));
    };
  }
  return t;
}

TensorSpec attention_k(DType dtype, const AttentionData& data) {
  const std::int64_t dim = data.model.head_dim;
  TensorSpec t{"k", dtype, data.slots, data.model.num_kv_heads * dim, Role::activation, dim};
  const auto layout = std::make_shared<const Layout>(data);
  if (plain(data.fill)) {
    t.source = layout->key_of_slot;
    return t;
  }
  const bool one_hot = data.fill == Fill::one_hot;
  t.value = [layout, dim, one_hot](const DataRegime& g, std::int64_t slot, std::int64_t col) {
    const std::int64_t kv_head = col / dim, c = col % dim;
    if (one_hot && c == 0) return 8.0;
    if (one_hot && layout->stale(slot)) {
      if (const auto who = layout->tempted(g.seed, slot, kv_head))
        return 1.25 *
               layout->code(g.seed, layout->target(g.seed, who->token, who->head), kv_head, c);
    }
    return layout->code(g.seed, layout->key_of_slot[std::size_t(slot)], kv_head, c);
  };
  return t;
}

TensorSpec attention_v(DType dtype, const AttentionData& data) {
  const std::int64_t dim = data.model.value_head_dim();
  TensorSpec t{"v", dtype, data.slots, data.model.num_kv_heads * dim, Role::activation, dim};
  const auto layout = std::make_shared<const Layout>(data);
  if (plain(data.fill)) {
    t.source = layout->key_of_slot;
    return t;
  }
  const bool real = data.fill == Fill::tripwire;
  t.value = [layout, dim, cols = t.cols, stream = stream_of(t.name), real, last = LastPhilox()](
                const DataRegime& g, std::int64_t slot, std::int64_t col) mutable {
    const std::uint64_t index = std::uint64_t(layout->key_of_slot[std::size_t(slot)] * cols + col);
    if (!real) return integer_of(last(g.seed, stream, index / 4)[index % 4]);
    // About normal, and about its head.
    double sum = 0;
    for (const std::uint32_t bits : philox(g.seed, stream, index))
      sum += sign_of(bits) * fraction_of(bits);
    return 0.87 * sum + double(1 + col / dim % 4) + (layout->stale(slot) ? 40 : 0);
  };
  return t;
}

TensorSpec attention_sinks(const AttentionData& data) {
  TensorSpec t{"sinks", DType::f32, 1, data.model.num_heads, Role::activation, 1};
  if (plain(data.fill)) return t;
  // About as heavy as what the kind of data has: the target, all keys together, a watched key.
  const double target =
      data.scale * (OneHot(data).size * double(data.model.head_dim - 1) + 8 * OneHot(data).push);
  double from = target - 2, width = 4;
  if (data.fill == Fill::one_hot && data.softcap > 0) from = -data.softcap / 4 - 2;
  if (data.fill != Fill::one_hot) from = 0.5;
  t.value = [stream = stream_of(t.name), from, width](const DataRegime& g, std::int64_t,
                                                      std::int64_t col) {
    return from + width * fraction_of(philox(g.seed, stream, std::uint64_t(col))[0]);
  };
  return t;
}

namespace {

// small_rows is about eps, which attention has none of.
constexpr std::array kAttentionFills = {Fill::exact, Fill::dense,      Fill::wide,
                                        Fill::equal, Fill::zero_shard, Fill::one_hot,
                                        Fill::ties,  Fill::tripwire};

}  // namespace

Key attention_fill_key() {
  Key key = shared_key("fill");
  key.words.clear();
  for (const Fill fill : kAttentionFills) key.words.emplace_back(kFillWords[std::size_t(fill)]);
  key.max = std::int64_t(kAttentionFills.size()) - 1;
  key.weights = {15, 20, 4, 3, 3, 20, 15, 20};
  key.get_field = [](const Case& c) -> std::int64_t {
    return std::find(kAttentionFills.begin(), kAttentionFills.end(), c.fill) -
           kAttentionFills.begin();
  };
  key.set_field = [](Case& c, std::int64_t v) { c.fill = kAttentionFills[std::size_t(v)]; };
  return key;
}

}  // namespace tp
