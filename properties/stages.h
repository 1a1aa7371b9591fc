#pragma once
// The stages of operators, for an operator that is made of others.

#include "properties/run/stage.h"
#include "properties/stored_linear.h"

namespace tp {

// `c` is a case of that operator. Linears: the product comes last, behind the stages that its
// weights and activations need where these are loaded and quantised (stored_linear.h).
std::vector<Stage> qkv_linear_stages(const Case& c, const ShardingRules& rules,
                                     const Variation& variation);
std::vector<Stage> row_linear_stages(const Case& c, const ShardingRules& rules,
                                     const Variation& variation);
stored_linear::Layer qkv_linear_layer(const Case& c);
stored_linear::Layer row_linear_layer(const Case& c);
// One stage each.
Stage qk_norm_stage(const Case& c, const ShardingRules& rules, const Variation& variation);
Stage rope_stage(const Case& c, const ShardingRules& rules, const Variation& variation);

// The product of row_linear in two, for whoever does something to the partial sums before they are
// added up: the first leaves them in a tensor `partial` [tp_size * num_tokens, hidden_size], rank
// r's from row r * num_tokens on and in its buffer `partial`; the second adds up those of a tensor
// and buffer of any name, of the same shape and type (that of the case's reduce_dtype).
Stage row_partial_stage(const Case& c, const ShardingRules& rules, const Variation& variation);
Stage row_reduce_stage(const Case& c, const ShardingRules& rules, const std::string& partial);

// Where attention finds q, k and v if these are not columns of one fused row: in rows of the same
// number of tokens.
struct AttentionSources {
  struct Columns {
    std::string buffer;
    // Of that buffer: how wide it is, and the first of the columns.
    std::function<std::int64_t(const RankShape&)> width, at;
  };
  Columns q, k, v;
};
Stage attention_stage(const Case& c, const ShardingRules& rules, const Variation& variation,
                      const AttentionSources& sources);

// The same stage with other names for its tensors and buffers; those that are not mentioned keep
// theirs. A tensor whose new name is empty is left out of the buffers.
struct Names {
  std::map<std::string, std::string> tensors;
  BufferAliases buffers;
};
Stage renamed(Stage stage, std::string name, const Names& names);

}  // namespace tp
