// The same update over host memory.
#include "adamw.h"

namespace {

template <typename Grad>
void run(const Phi4AdamW& call) {
    const phi4::AdamWFactors factors =
        phi4::adamw_factors(call, call.device_lr ? *call.device_lr : call.lr,
                            call.device_step ? *call.device_step : call.step);
    const float grad_scale = call.grad_scale ? *call.grad_scale : 1.0f;
    const bool wide = phi4::adamw_wide<Grad>(call);
    for (int64_t offset = 0; offset < call.n; offset += phi4::kPack) {
        phi4::adamw_pack<Grad>(call, factors, grad_scale, offset, wide);
    }
}

}  // namespace

extern "C" int phi4_adamw_host(const Phi4AdamW* call) {
    call->grad_type == PHI4_BFLOAT16 ? run<__nv_bfloat16>(*call) : run<float>(*call);
    return 0;
}
