#pragma once

namespace tp {

// How the scales of the tensors that one layer was loaded from (slots: q, k and v; gate and up)
// become the one scale of the layer. The right one is max: then no weight leaves the type's range
// when it is quantised again.
enum class SlotReduction : unsigned char { max, min, first, last, mean };

}  // namespace tp
