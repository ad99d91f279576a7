// AdamW with decoupled weight decay, for one element: fp32 state, scalars folded in fp64.
// Source: Loshchilov and Hutter 2019, algorithm 2.
#pragma once

#include <cmath>

#include "../fp8_cast/fp8_cast.h"
#include "../numerics.h"
#include "../phi4_csrc.h"

namespace phi4 {

struct AdamWFactors {
    float decay, beta1_rest, beta2, beta2_rest, step_size, root_correction, eps;
};

struct AdamWElement {
    float param, exp_avg, exp_avg_sq;
};

// By squaring: log2(exponent) products, the same bits on host and device, unlike pow().
PHI4_HD double power(double base, int64_t exponent) {
    double result = 1.0;
    for (; exponent > 0; exponent >>= 1, base *= base) {
        if (exponent & 1) result *= base;
    }
    return result;
}

PHI4_HD AdamWFactors adamw_factors(const Phi4AdamWStep& call, double lr, int64_t step) {
    const double correction1 = 1.0 - power(call.beta1, step);
    const double correction2 = 1.0 - power(call.beta2, step);
    AdamWFactors f;
    f.decay = static_cast<float>(1.0 - lr * call.weight_decay);
    f.beta1_rest = static_cast<float>(1.0 - call.beta1);
    f.beta2 = static_cast<float>(call.beta2);
    f.beta2_rest = static_cast<float>(1.0 - call.beta2);
    f.step_size = static_cast<float>(lr / correction1);
    f.root_correction = static_cast<float>(1.0 / sqrt(correction2));
    f.eps = static_cast<float>(call.eps);
    return f;
}

PHI4_HD AdamWElement adamw_update(const AdamWFactors& f, AdamWElement old, float grad) {
    AdamWElement now;
    now.exp_avg = fmaf(f.beta1_rest, grad - old.exp_avg, old.exp_avg);
    now.exp_avg_sq = fmaf(f.beta2, old.exp_avg_sq, f.beta2_rest * (grad * grad));
    const float denominator = fmaf(sqrtf(now.exp_avg_sq), f.root_correction, f.eps);
    now.param = fmaf(-f.step_size, now.exp_avg / denominator, old.param * f.decay);
    return now;
}

// One pack of elements at `offset`: what a thread does, and what the host loops over. Returns the
// largest magnitude of the new parameters, for kFp8.
template <typename Grad, bool kFp8>
PHI4_HD uint32_t adamw_pack(const Phi4AdamWShard& shard, const AdamWFactors& f, float grad_scale,
                            int64_t offset, bool wide) {
    const int64_t count = shard.n - offset;
    Pack<float> p = load_pack(shard.param + offset, count, wide);
    Pack<float> m = load_pack(shard.exp_avg + offset, count, wide);
    Pack<float> v = load_pack(shard.exp_avg_sq + offset, count, wide);
    const Pack<Grad> g = load_pack(static_cast<const Grad*>(shard.grad) + offset, count, wide);
    Pack<__nv_bfloat16> w;
    Pack<uint8_t> bytes;
    uint32_t amax = 0;
    for (int i = 0; i < kPack; ++i) {
        const AdamWElement now =
            adamw_update(f, {p.lane[i], m.lane[i], v.lane[i]}, widened(g.lane[i]) * grad_scale);
        p.lane[i] = now.param;
        m.lane[i] = now.exp_avg;
        v.lane[i] = now.exp_avg_sq;
        w.lane[i] = to_bfloat16(now.param);
        if (kFp8) {
            bytes.lane[i] = quantized<false>(now.param, *shard.fp8_scale);
            const uint32_t magnitude = i < count ? magnitude_bits(now.param) : 0;
            amax = magnitude > amax ? magnitude : amax;
        }
    }
    store_pack(shard.param + offset, p, count, wide);
    store_pack(shard.exp_avg + offset, m, count, wide);
    store_pack(shard.exp_avg_sq + offset, v, count, wide);
    if (shard.weight != nullptr)
        store_pack(static_cast<__nv_bfloat16*>(shard.weight) + offset, w, count, wide);
    if (kFp8) store_pack(shard.fp8 + offset, bytes, count, wide);
    return amax;
}

template <typename Grad>
PHI4_HD bool adamw_wide(const Phi4AdamWShard& shard) {
    return pack_aligned(shard.param) && pack_aligned(shard.exp_avg) &&
           pack_aligned(shard.exp_avg_sq) && pack_aligned(static_cast<const Grad*>(shard.grad)) &&
           pack_aligned(static_cast<const __nv_bfloat16*>(shard.weight)) && pack_aligned(shard.fp8);
}

}  // namespace phi4
