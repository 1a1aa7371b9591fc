#pragma once
// quantization_config of a config.json, read: apart from quantization_config.h, so that whoever
// knows models need not know JSON.

#include "harness/base/json.h"
#include "harness/base/quantization_config.h"

namespace tp {

// Of a config.json: quantization_config or compression_config, at the top (`root`) or where the
// language model's keys are (`text`); else of ModelOpt's own file beside it (`beside`, may be
// null). None of them: nothing is quantised. Never throws: what is not known is told of those whom
// it concerns, refusal and format_of(). `num_layers`: of the model; their names may be in patterns.
Quantization quantization_of(const Json& root, const Json& text, const Json* beside,
                             int num_layers);

}  // namespace tp
