// The same update over host memory.
#include "adamw.h"

namespace {

template <typename Grad, bool kFp8>
void run(const Phi4AdamWShard& shard, const phi4::AdamWFactors& factors, float grad_scale) {
    const bool wide = phi4::adamw_wide<Grad>(shard);
    uint32_t amax = kFp8 ? phi4::magnitude_bits(*shard.fp8_amax) : 0;
    for (int64_t offset = 0; offset < shard.n; offset += phi4::kPack) {
        const uint32_t found =
            phi4::adamw_pack<Grad, kFp8>(shard, factors, grad_scale, offset, wide);
        amax = found > amax ? found : amax;
    }
    if (kFp8) *shard.fp8_amax = phi4::from_bits(amax);
}

template <typename Grad>
void run_all(const Phi4AdamWShard* shards, int64_t num_shards, const Phi4AdamWStep& call) {
    const phi4::AdamWFactors factors =
        phi4::adamw_factors(call, call.device_lr ? *call.device_lr : call.lr,
                            call.device_step ? *call.device_step : call.step);
    const float grad_scale = call.grad_scale ? *call.grad_scale : 1.0f;
    for (int64_t i = 0; i < num_shards; ++i) {
        shards[i].fp8 != nullptr ? run<Grad, true>(shards[i], factors, grad_scale)
                                 : run<Grad, false>(shards[i], factors, grad_scale);
    }
}

}  // namespace

extern "C" int phi4_adamw_host(const Phi4AdamWShard* shards, int64_t num_shards,
                               const Phi4AdamWStep* step) {
    if (step->found_inf != nullptr && *step->found_inf != 0.0f) return 0;
    step->grad_type == PHI4_BFLOAT16 ? run_all<__nv_bfloat16>(shards, num_shards, *step)
                                     : run_all<float>(shards, num_shards, *step);
    return 0;
}
