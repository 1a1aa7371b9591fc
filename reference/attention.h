#pragma once
// The definition of attention in double, one rank, plain loops, and the budget of a correct kernel.
//   s_j = scale q.k_j, then cap tanh(s_j / cap), then - slope |position - j|, for the visible keys
//   j lse = log(sum_j exp(s_j) + exp(sink)),  out = sum_j exp(s_j - lse) v_j
// Query head h reads KV head h / (num_heads / num_kv_heads). (Vaswani et al., arXiv 1706.03762; GQA
// 2305.13245; ALiBi 2108.12409; softcap as in Gemma 2; a sink takes weight and has no value, as in
// GPT-OSS.) A row that sees no key is 0, and its LSE is the sink or -infinity.
// The budget follows research/numerics.md section 5.4: what differs is said where it is.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "harness/base/check.h"
#include "harness/base/compare.h"
#include "harness/base/sequences.h"
#include "harness/base/shape.h"
#include "harness/base/tensor.h"

namespace tp::reference {

struct AttentionOptions {
  double scale = 1;
  AttentionMask mask;
  double softcap = 0;  // 0: none
};

struct Attention {
  Budget out;  // [tokens, num_heads * value_head_dim]
  Budget lse;  // [tokens, num_heads], natural logarithm
};

// Exponent of the lowest set bit of x, which is no subnormal: x is a multiple of 2^that. Zero is a
// multiple of everything.
inline int lowest_bit(double x) {
  if (x == 0) return 2000;
  const std::uint64_t bits = std::bit_cast<std::uint64_t>(x);
  const std::uint64_t significand = (bits & ((1ull << 52) - 1)) | 1ull << 52;
  return int(bits >> 52 & 0x7FF) - 1075 + std::countr_zero(significand);
}

// Of n numbers, the smallest that is not zero; infinity if all are.
inline double least_magnitude(const double* x, std::int64_t n) {
  double least = std::numeric_limits<double>::infinity();
  for (std::int64_t i = 0; i < n; ++i) {
    if (x[i] != 0) least = std::min(least, std::fabs(x[i]));
  }
  return least;
}

// Keys and values of one sequence and KV head, in the order of their positions.
struct KeyValues {
  KeyValues(const Matrix& k_rows, const Matrix& v_rows, const std::vector<std::int64_t>& slots,
            std::int64_t kv_head, std::int64_t head_dim, std::int64_t v_head_dim)
      : k(std::int64_t(slots.size()), head_dim), v(k.rows, v_head_dim) {
    for (const std::int64_t slot : slots) {
      const std::size_t at = k_bit.size();
      std::copy_n(k_rows.row(slot) + kv_head * head_dim, head_dim, k.row(std::int64_t(at)));
      std::copy_n(v_rows.row(slot) + kv_head * v_head_dim, v_head_dim, v.row(std::int64_t(at)));
      k_bit.push_back(2000);
      v_bit.push_back(2000);
      v_max.push_back(0);
      k_least.push_back(least_magnitude(k.row(std::int64_t(at)), head_dim));
      v_least.push_back(least_magnitude(v.row(std::int64_t(at)), v_head_dim));
      for (std::int64_t c = 0; c < head_dim; ++c)
        k_bit[at] = std::min(k_bit[at], lowest_bit(k.row(std::int64_t(at))[c]));
      for (std::int64_t c = 0; c < v_head_dim; ++c) {
        v_bit[at] = std::min(v_bit[at], lowest_bit(v.row(std::int64_t(at))[c]));
        v_max[at] = std::max(v_max[at], std::fabs(v.row(std::int64_t(at))[c]));
      }
    }
  }

  Matrix k, v;
  std::vector<int> k_bit, v_bit;         // lowest set bit of each row
  std::vector<double> v_max;             // largest magnitude in each row
  std::vector<double> k_least, v_least;  // smallest one in each row, but for zeros
};

// One query through one head: what it sees, and what a kernel can know of that.
class AttentionRow {
 public:
  AttentionRow(const AttentionOptions& options, const AttentionProfile& profile)
      : options_(options), profile_(profile) {}

  // Writes `v.cols` outputs and one LSE. `sink` is -infinity where there is none.
  void attend(const double* q, const KeyValues& kv, std::int64_t position, double slope,
              double sink, double* out, double* out_rho, double* lse, double* lse_rho) {
    visible_ = options_.mask.visible(position, kv.k.rows);
    const std::int64_t dims = kv.v.cols;
    if (visible_.size == 0) {
      std::fill_n(out, dims, 0.0);
      std::fill_n(out_rho, dims, 0.0);
      *lse = sink;
      *lse_rho = std::isfinite(sink) ? 4 * kU * std::fabs(sink) : 0;  // to base 2 and back
      return;
    }
    score(q, kv, position, slope);
    find_peak(slope);
    weigh(sink);
    if (absorbs(kv)) {
      peak_only(kv, out, out_rho);
    } else {
      all_keys(kv, out, out_rho);
    }
    *lse = lse_;
    *lse_rho = lse_radius();
  }

 private:
  static constexpr double kU = 0x1p-24;

  // s_, error_ (what a computed score may be off by), exact_ (its sum of products is not at all).
  void score(const double* q, const KeyValues& kv, std::int64_t position, double slope) {
    const std::size_t n = std::size_t(visible_.size);
    s_.resize(n);
    raw_.resize(n);
    error_.resize(n);
    exact_.resize(n);
    const std::int64_t dims = kv.k.cols;
    int q_bit = 2000;
    for (std::int64_t c = 0; c < dims; ++c) q_bit = std::min(q_bit, lowest_bit(q[c]));
    const double scale = options_.scale, cap = options_.softcap, qk_error = profile_.qk.error();
    // q, k and v are of the type of the weights where matrix steps multiply them.
    Accumulation qk = profile_.qk;
    if (qk.matrix_steps) qk.least_normal = std::ldexp(1.0, format_of(profile_.p).emin);
    const double q_least = least_magnitude(q, dims);
    for (std::size_t j = 0; j < n; ++j) {
      const std::int64_t key = visible_.offset + std::int64_t(j);
      const double* k = kv.k.row(key);
      double sum = 0, size = 0;
      for (std::int64_t c = 0; c < dims; ++c) {
        sum += q[c] * k[c];
        size += std::fabs(q[c] * k[c]);
      }
      double raised = 0;
      if (std::min(q_least, kv.k_least[std::size_t(key)]) < qk.least_normal) {
        for (std::int64_t c = 0; c < dims; ++c) raised += qk.raised(q[c], k[c]);
      }
      // All products are multiples of 2^bit, and no partial sum needs more than 24 bits above it;
      // nor is a product taken to be so large that a matrix step cuts off something of the others.
      const int bit = q_bit + kv.k_bit[std::size_t(key)];
      exact_[j] = size == 0 || (bit < 1000 && std::max(size, raised) <= std::ldexp(1.0, 24 + bit));
      double s = sum * scale;
      raw_[j] = s;
      // Conversion of the scale, and of log2(e) where the exponent is base 2, and their products.
      double error = 4 * kU * std::fabs(s);
      if (!exact_[j]) {
        error += std::fabs(scale) * (size * (qk_error + double(dims) * 0x1p-53) + qk.cut(raised) +
                                     double(dims) * 0x1p-149);
      }
      if (cap > 0) {
        // tanh is no steeper than at the near end of the interval; its argument is rounded three
        // times, and x tanh'(x) <= 0.45; then the function itself, cap and their product.
        const double near = std::tanh(std::max(0.0, std::fabs(s) - error) / cap);
        error = error * (1 - near * near) + 3 * kU * std::min(std::fabs(s), 0.45 * cap);
        s = cap * std::tanh(s / cap);
        error += (2 * profile_.tanh_ulps + 4) * kU * std::fabs(s);
      }
      if (slope != 0) {
        const double bias = -slope * std::fabs(double(position - key));
        s += bias;
        error += 4 * kU * std::fabs(bias) + kU * std::fabs(s);
      }
      s_[j] = s;
      error_[j] = error;
    }
  }

  // The keys that certainly are the maximum of the computed scores: their weights are exp(0) = 1,
  // no rounding of theirs is one, and no rescaling touches them. Several must be equal by exact
  // sums, for scores that are equal in double could be computed apart. Maybe nobody.
  void find_peak(double slope) {
    const std::size_t n = s_.size();
    max_ = *std::max_element(s_.begin(), s_.end());
    at_peak_.assign(n, false);
    std::size_t first = n;
    peak_ = 0;
    bool certain = true;
    for (std::size_t j = 0; j < n; ++j) {
      if (s_[j] != max_) continue;
      if (first == n) first = j;
      certain = certain && (j == first ||
                            (slope == 0 && exact_[j] && exact_[first] && raw_[j] == raw_[first]));
      at_peak_[j] = true;
      ++peak_;
    }
    peak_error_ = error_[first];
    for (std::size_t j = 0; j < n && certain; ++j)
      certain = at_peak_[j] || s_[j] + error_[j] < max_ - peak_error_;
    if (certain) return;
    at_peak_.assign(n, false);
    peak_ = 0;
  }

  // exp(x) - 1 for x >= 0, or a little more; finite.
  static double growth(double x) { return x <= 1 ? x * (1 + x) : std::exp(std::min(x, 30.0)); }

  // w_, delta_ (relative error of a weight against the others, as an exponent), and what the row
  // has in common.
  void weigh(double sink) {
    const std::size_t n = s_.size();
    sunk_ = std::isfinite(sink);
    top_ = std::max(max_, sink);
    sum_ = sunk_ ? std::exp(sink - top_) : 0;
    w_.resize(n);
    for (std::size_t j = 0; j < n; ++j) sum_ += w_[j] = std::exp(s_[j] - top_);
    for (double& w : w_) w /= sum_;
    sink_weight_ = sunk_ ? std::exp(sink - top_) / sum_ : 0;
    lse_ = top_ + std::log(sum_);

    const std::int64_t tiles = (visible_.size + profile_.kv_tile - 2) / profile_.kv_tile + 1;
    rescalings_ = double(tiles - 1 + profile_.merges);
    const double exp_error = 2 * profile_.exp_ulps * kU;
    // Between the exponent's two ends lie one subtraction and, in base e, two roundings to base 2;
    // over all rescalings the ends add up to top - s.
    const auto exponent = [&](double s) { return 3 * kU * (lse_ - s); };
    // A state that is merged: its LSE (a sum, a logarithm, to base 2 and back) is at least s and
    // at most lse; then its weight.
    const auto merging = [&](double s) {
      return kU * (4 * std::max(std::fabs(s), std::fabs(lse_)) +
                   (2 * profile_.log_ulps + 2) * std::log(double(n + 1)) + 1) +
             exponent(s) + exp_error;
    };
    const bool merged = profile_.splits > 1 || sunk_;
    delta_.resize(n);
    double from_all = 0, from_peak = 0;
    largest_delta_ = 0;
    for (std::size_t j = 0; j < n; ++j) {
      delta_[j] = error_[j];
      if (!at_peak_[j]) delta_[j] += exponent(s_[j]) + exp_error * (1 + rescalings_);
      if (merged) delta_[j] += merging(s_[j]);
      largest_delta_ = std::max(largest_delta_, delta_[j]);
      from_all += w_[j] * delta_[j];
      from_peak += w_[j] * (at_peak_[j] ? delta_[j] - error_[j] : delta_[j] + peak_error_);
    }
    sink_delta_ = sunk_ ? 4 * kU * std::fabs(sink) + merging(sink) : 0;
    largest_delta_ = std::max(largest_delta_, sink_delta_);
    double grown = sink_weight_ * growth(sink_delta_);
    for (std::size_t j = 0; j < n; ++j) grown += w_[j] * growth(delta_[j]);
    lse_spread_ = std::min(grown / shrunk(), largest_delta_);

    // Softmax does not mind a shift, so scores may be measured from the computed peak as well:
    // better where it has most of the weight.
    if (peak_ > 0 && from_peak + sink_weight_ * peak_error_ < from_all) {
      for (std::size_t j = 0; j < n; ++j) delta_[j] += at_peak_[j] ? -error_[j] : peak_error_;
      if (sunk_) sink_delta_ += peak_error_;
    }
    shrunk_ = shrunk();
  }

  // Weights may grow by delta while their sum, which is 1, shrinks to this.
  double shrunk() const {
    double sum = sink_weight_ / (1 + growth(sink_delta_));
    for (std::size_t j = 0; j < w_.size(); ++j) sum += w_[j] / (1 + growth(delta_[j]));
    return sum;
  }

  // Whether all but the peak is too small to leave a trace in a sum that holds a part of the peak:
  // those sums are multiples of 2^bit, exact, and the rest is below 2^-26 of that (2^-8 is for
  // errors of the rest). Tensor cores truncate it, additions round it away. Subnormal values change
  // nothing there: the weight of the peak is 1, and in f16 the others are 0.
  bool absorbs(const KeyValues& kv) {
    if (peak_ == 0) return false;
    double peak_size = 0;
    rest_ = sink_weight_ * sum_ * (1 + growth(sink_delta_));
    v_max_ = 0;
    int bit = 2000;
    for (std::size_t j = 0; j < s_.size(); ++j) {
      const std::size_t key = std::size_t(visible_.offset) + j;
      v_max_ = std::max(v_max_, kv.v_max[key]);
      if (at_peak_[j]) {
        bit = std::min(bit, kv.v_bit[key]);
        peak_size += kv.v_max[key];
      } else {
        rest_ += w_[j] * sum_ * (1 + growth(delta_[j])) + 0x1p-126;
      }
    }
    const double unit = peak_size == 0 ? v_max_ : std::ldexp(1.0, bit);
    const bool sum_is_exact = peak_ == 1 || peak_size <= std::ldexp(unit, 24);
    return sum_is_exact && rest_ * 0x1p34 < 1 && (rest_ * 0x1p34 * v_max_ < unit || rest_ == 0);
  }

  // The mean of the values at the peak: nothing rounds but the division, and merging.
  void peak_only(const KeyValues& kv, double* out, double* rho) {
    const std::int64_t dims = kv.v.cols;
    std::fill_n(out, dims, 0.0);
    std::fill_n(rho, dims, 0.0);
    const auto for_peak = [&](auto&& f) {
      for (std::size_t j = 0; j < s_.size(); ++j) {
        if (at_peak_[j]) f(kv.v.row(visible_.offset + std::int64_t(j)), delta_[j]);
      }
    };
    for_peak([&](const double* v, double) {
      for (std::int64_t c = 0; c < dims; ++c) out[c] += v[c];
    });
    const double count = double(peak_);
    const bool merged = profile_.splits > 1 && peak_ > 1;
    const double merging = merged ? double(profile_.splits + 3) * kU : 0;
    for (std::int64_t c = 0; c < dims; ++c) out[c] /= count;
    if (merged) {
      for_peak([&](const double* v, double delta) {
        for (std::int64_t c = 0; c < dims; ++c)
          rho[c] += (growth(delta) * std::fabs(v[c] - out[c]) + merging * std::fabs(v[c])) / count;
      });
    }
    const double division = std::has_single_bit(std::uint64_t(peak_)) ? 0 : 2 * kU + 0x1p-52;
    for (std::int64_t c = 0; c < dims; ++c) {
      rho[c] += std::fabs(out[c]) * (division + merging);
      if (out[c] == 0) rho[c] += 4 * rest_ * v_max_;  // nothing there to be absorbed by
    }
    absorbed_ = true;
  }

  void all_keys(const KeyValues& kv, double* out, double* rho) {
    absorbed_ = false;
    const std::int64_t dims = kv.v.cols;
    const std::int64_t n = visible_.size;
    std::fill_n(out, dims, 0.0);
    double v_max = 0;
    for (std::int64_t j = 0; j < n; ++j) {
      const double* v = kv.v.row(visible_.offset + j);
      const double w = w_[std::size_t(j)];
      for (std::int64_t c = 0; c < dims; ++c) out[c] += w * v[c];
      v_max = std::max(v_max, kv.v_max[std::size_t(visible_.offset + j)]);
    }

    // Per key: how much its weight may be off, and what the sums with v round.
    Accumulation pv = profile_.pv;
    pv.depth = std::min(pv.depth, n);
    if (pv.matrix_steps) pv.least_normal = std::ldexp(1.0, format_of(profile_.p).emin);
    const bool merged = profile_.splits > 1 || sunk_;
    const double states = double(profile_.splits) + sunk_;
    const double sums =
        pv.error() + (rescalings_ + (merged ? states + 3 : 0)) * kU + double(n) * 0x1p-52;
    std::fill_n(rho, dims, 0.0);
    spread_.assign(std::size_t(dims), 0.0);
    double lost = 0;
    const bool rounds_p = profile_.p != DType::f32;
    order_keys(rounds_p);
    rounded_.assign(std::size_t(dims), 0.0);
    variance_.assign(std::size_t(dims), 0.0);
    cell_.assign(std::size_t(dims), 0.0);
    for (std::size_t i = 0; i < order_.size(); ++i) {
      const std::size_t j = std::size_t(order_[i].second);
      const double w = w_[j] * (1 + growth(delta_[j])) / shrunk_;  // the most it can be
      const double off = w_[j] * growth(delta_[j]) / shrunk_;
      double sum = w * sums;
      if (lse_ - s_[j] > 80) {  // may be flushed to zero, by itself or by a rescaling
        sum += 0x1p-125 / sum_;
        lost += 0x1p-125 / sum_;
      }
      if (profile_.p == DType::f16 && w * sum_ < 0x1p-13) sum += std::min(0x1p-25 / sum_, w);
      const double* v = kv.v.row(visible_.offset + std::int64_t(j));
      // What matrix steps cut off beside a subnormal v. Beside a subnormal weight it is no more
      // than 17 * 2^-39 |v|, and in `sum` are 2^-25 |v|.
      if (kv.v_least[std::size_t(visible_.offset) + j] < pv.least_normal) {
        for (std::int64_t c = 0; c < dims; ++c) rho[c] += pv.cut(pv.raised(w, v[c]));
      }
      for (std::int64_t c = 0; c < dims; ++c) {
        rho[c] += sum * std::fabs(v[c]);
        spread_[std::size_t(c)] += off * std::fabs(v[c] - out[c]);
      }
      if (!rounds_p) continue;
      // Weights of one cell are closer than the spacing of their type and round the same way: they
      // count as one. Different cells round independently.
      const double round = at_peak_[j] ? 0 : w;
      for (std::int64_t c = 0; c < dims; ++c) cell_[std::size_t(c)] += round * std::fabs(v[c]);
      if (i + 1 < order_.size() && order_[i + 1].first == order_[i].first) continue;
      for (std::size_t c = 0; c < std::size_t(dims); ++c) {
        rounded_[c] += cell_[c];
        variance_[c] += cell_[c] * cell_[c];
        cell_[c] = 0;
      }
    }

    // Row sum, rescaling it, merging, the division.
    const double total = double(std::min(profile_.sum_depth, n)) * kU + rescalings_ * kU +
                         (merged ? (states + 3) * kU : 0) + 3 * kU + lost;
    const double p_error = std::ldexp(1.0, -format_of(profile_.p).p);
    for (std::int64_t c = 0; c < dims; ++c) {
      double& spread = spread_[std::size_t(c)];
      spread += sink_weight_ * growth(sink_delta_) / shrunk_ * std::fabs(out[c]);
      // Whatever the weights are, their mean of v is among the values.
      rho[c] += std::min(spread, 2 * v_max) + std::fabs(out[c]) * total + 0x1p-149;
      if (!rounds_p) continue;
      // 8 standard deviations of uniform errors, unless the worst case is less.
      rho[c] += p_error * std::min(rounded_[std::size_t(c)],
                                   8 / std::sqrt(3.0) * std::sqrt(variance_[std::size_t(c)]));
    }
  }

  // order_: (cell, key), by cell where a rounding of P could be taken as independent: with fewer
  // than 22 keys the worst case is the sharper one.
  void order_keys(bool rounds_p) {
    order_.clear();
    const bool cells = rounds_p && s_.size() >= 22;
    const double width = std::ldexp(1.0, -format_of(profile_.p).p);
    for (std::size_t j = 0; j < s_.size(); ++j)
      order_.emplace_back(cells ? std::floor(s_[j] / width) : double(j), std::int64_t(j));
    if (cells) std::sort(order_.begin(), order_.end());
  }

  double lse_radius() const {
    // m + log(sum), to base 2 and back; once more for the merged states.
    const double log_error = 2 * profile_.log_ulps + 2;
    const double largest = std::max(std::fabs(top_), std::fabs(lse_));
    double rho = kU * (3 * largest + log_error * (lse_ - top_));
    rho += double(visible_.size - 1 + sunk_) * 0x1p-52;  // of the sum in this very loop
    const double states = double(profile_.splits) + sunk_;
    if (states > 1) rho += kU * (3 * largest + log_error * std::log(states));
    if (absorbed_ && (profile_.splits == 1 || peak_ == 1)) return rho + peak_error_ + rest_;
    const double sums = double(std::min(profile_.sum_depth, visible_.size)) + rescalings_ + states;
    return rho + lse_spread_ + sums * kU + 0x1p-149;
  }

  const AttentionOptions& options_;
  const AttentionProfile& profile_;
  Shard visible_;
  // By visible key.
  std::vector<double> s_, raw_, error_, w_, delta_;
  std::vector<bool> exact_, at_peak_;
  std::vector<std::pair<double, std::int64_t>> order_;
  // By output element.
  std::vector<double> spread_, rounded_, variance_, cell_;
  // Of the row.
  std::int64_t peak_ = 0;  // keys at the peak
  double max_ = 0, peak_error_ = 0, v_max_ = 0;
  double top_ = 0, sum_ = 0, lse_ = 0;  // sum of exp(s - top)
  double rescalings_ = 0, largest_delta_ = 0, shrunk_ = 1, lse_spread_ = 0;
  bool sunk_ = false;
  double sink_weight_ = 0, sink_delta_ = 0;
  bool absorbed_ = false;
  double rest_ = 0;  // weight outside the peak, a key of which weighs 1
};

// q [tokens, num_heads * head_dim], k [slots, num_kv_heads * head_dim], v [slots, num_kv_heads *
// value_head_dim]; sinks and slopes (of ALiBi) [1, num_heads] or null. Rows of q that belong to no
// sequence are left at 0.
inline Attention attention(const Matrix& q, const Matrix& k, const Matrix& v, const Matrix* sinks,
                           const Matrix* slopes, const ModelShape& model,
                           const std::vector<Sequence>& sequences, const AttentionOptions& options,
                           const AttentionProfile& profile) {
  const std::int64_t heads = model.num_heads, dim = model.head_dim;
  const std::int64_t v_dim = model.value_head_dim();
  const std::int64_t group = div_exact(heads, model.num_kv_heads);
  TP_CHECK(q.cols == heads * dim && k.cols == model.num_kv_heads * dim &&
               v.cols == model.num_kv_heads * v_dim && k.rows == v.rows,
           "shapes of q, k and v");
  Attention result{Budget(q.rows, heads * v_dim), Budget(q.rows, heads)};
  AttentionRow row(options, profile);
  for (const Sequence& sequence : sequences) {
    for (std::int64_t kv_head = 0; kv_head < model.num_kv_heads; ++kv_head) {
      const KeyValues kv(k, v, sequence.keys, kv_head, dim, v_dim);
      for (std::int64_t i = 0; i < sequence.queries.size; ++i) {
        const std::int64_t token = sequence.queries.offset + i;
        for (std::int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
          const std::size_t at = std::size_t(token * heads + head);
          row.attend(q.row(token) + head * dim, kv, sequence.position_of(i),
                     slopes ? slopes->row(0)[head] : 0,
                     sinks ? sinks->row(0)[head] : -std::numeric_limits<double>::infinity(),
                     result.out.r.data() + at * std::size_t(v_dim),
                     result.out.rho.data() + at * std::size_t(v_dim), &result.lse.r[at],
                     &result.lse.rho[at]);
        }
      }
    }
  }
  return result;
}

}  // namespace tp::reference
