// The same sums over host memory, in the same order.
#include <algorithm>

#include "grad_norm.h"

namespace {

template <typename LaneSum>
double block_sum(LaneSum lane_sum) {
    double lanes[phi4::kLanes];
    for (int lane = 0; lane < phi4::kLanes; ++lane) lanes[lane] = lane_sum(lane);
    for (int half = phi4::kLanes / 2; half > 0; half /= 2) {
        for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    }
    return lanes[0];
}

template <typename T>
int64_t tensor_partials(const T* tensor, int64_t size, double* partials) {
    for (int64_t chunk = 0; chunk < phi4::num_chunks(size); ++chunk) {
        const int64_t offset = chunk * phi4::kChunk;
        const int64_t count = std::min(phi4::kChunk, size - offset);
        partials[chunk] =
            block_sum([&](int lane) { return phi4::lane_sum(tensor + offset, count, lane); });
    }
    return phi4::num_chunks(size);
}

}  // namespace

extern "C" int64_t phi4_square_sum_partials(const int64_t* sizes, int64_t num_tensors) {
    int64_t total = 0;
    for (int64_t i = 0; i < num_tensors; ++i) total += phi4::num_chunks(sizes[i]);
    return total;
}

extern "C" int phi4_square_sum_host(const void* const* tensors, const int64_t* sizes,
                                    int64_t num_tensors, int type, double* partials,
                                    double* total) {
    int64_t done = 0;
    for (int64_t i = 0; i < num_tensors; ++i) {
        done +=
            type == PHI4_BFLOAT16
                ? tensor_partials(static_cast<const __nv_bfloat16*>(tensors[i]), sizes[i],
                                  partials + done)
                : tensor_partials(static_cast<const float*>(tensors[i]), sizes[i], partials + done);
    }
    *total = block_sum([&](int lane) { return phi4::partials_lane_sum(partials, done, lane); });
    return 0;
}
