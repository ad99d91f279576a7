// Quantisation to FP8: saturating, round to nearest even; NaN stays NaN.
#pragma once

#include <cmath>

#include "../numerics.h"
#include "../phi4_csrc.h"

namespace phi4 {

constexpr int kTile = 128;

template <bool kE5M2>
struct Format {
    static constexpr float kMax = kE5M2 ? 57344.0f : 448.0f;
    static constexpr __nv_fp8_interpretation_t kKind = kE5M2 ? __NV_E5M2 : __NV_E4M3;
};

template <bool kE5M2>
PHI4_HD uint8_t quantized(float x, float multiplier) {
    return __nv_cvt_float_to_fp8(x * multiplier, __NV_SATFINITE, Format<kE5M2>::kKind);
}

// What a block's bytes must be multiplied with. An infinity or NaN in a block makes all of it NaN;
// a block of zeros or of values too small to scale keeps the reciprocal finite.
template <bool kE5M2>
PHI4_HD float block_inverse(uint32_t amax_bits) {
    const float inverse = from_bits(amax_bits) / Format<kE5M2>::kMax;
    constexpr float kSmallest = 1.17549435e-38f;
    if (amax_bits == 0) return 1.0f;
    return inverse < kSmallest ? kSmallest : inverse;
}

// Slot of an element in shared memory: groups of four columns are exchanged within a row, so that a
// warp which takes one group from each fourth row touches every bank once.
PHI4_HD int tile_slot(int row, int column) {
    const int group = (column / kPack) ^ ((row / kPack) % (kTile / kPack));
    return row * kTile + group * kPack + column % kPack;
}

}  // namespace phi4
