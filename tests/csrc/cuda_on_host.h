// Runs kernels of csrc as host code, so that grids, tables, tails, barriers and warp reductions are
// executed where there is no GPU. A block's threads are fibers that change at barriers; blocks run
// one after another on a device of two multiprocessors. It shows no race and no time.
#pragma once

#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <vector>

#undef __global__
#undef __device__
#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(threads)
#define __grid_constant__
#define cudaGetDevice(device) (*(device) = 0, cudaSuccess)
#define cudaDeviceGetAttribute(value, attribute, device) (*(value) = 2, cudaSuccess)
#define cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, ...) (*(blocks) = 3, cudaSuccess)
#define cudaFuncSetAttribute(...) cudaSuccess
#define cudaGetLastError() cudaSuccess
#define cudaMemsetAsync(to, value, bytes, stream) (memset(to, value, bytes), cudaSuccess)

using std::max;
using std::min;

struct Index {
    unsigned x;
};
static Index threadIdx, blockIdx, gridDim;

namespace cuda_on_host {

constexpr int kWarp = 32;
constexpr int kStackBytes = 1 << 16;
constexpr int kSharedBytes = 232448;
alignas(16) static unsigned char dynamic_shared[kSharedBytes];

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(kStackBytes);
    bool done = false;
};
static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static std::function<void()> body;

struct Barrier {
    int arrived = 0;
    unsigned generation = 0;
    void wait(int size) {
        const unsigned mine = generation;
        if (++arrived == size) {
            arrived = 0;
            ++generation;
        }
        while (mine == generation) swapcontext(&fibers[threadIdx.x].context, &scheduler);
    }
};
static Barrier of_block, of_warp[1024 / kWarp];
static unsigned lanes[1024];

static void enter() {
    body();
    fibers[threadIdx.x].done = true;
}

static void run_block(unsigned threads) {
    fibers = std::vector<Fiber>(threads);
    for (Fiber& fiber : fibers) {
        getcontext(&fiber.context);
        fiber.context.uc_stack = {fiber.stack.data(), 0, fiber.stack.size()};
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, enter, 0);
    }
    for (bool waiting = true; waiting;) {
        waiting = false;
        for (unsigned i = 0; i < threads; ++i) {
            if (fibers[i].done) continue;
            threadIdx.x = i;
            swapcontext(&scheduler, &fibers[i].context);
            waiting |= !fibers[i].done;
        }
    }
}

template <typename Kernel>
void launch(int64_t blocks, unsigned threads, Kernel kernel) {
    body = kernel;
    gridDim.x = blocks;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
        // What a block leaves in shared memory is not there for the next.
        memset(dynamic_shared, 0xff, sizeof(dynamic_shared));
        run_block(threads);
    }
}

}  // namespace cuda_on_host

static inline void __syncthreads() { cuda_on_host::of_block.wait(cuda_on_host::fibers.size()); }

static inline unsigned __reduce_max_sync(unsigned, unsigned value) {
    using namespace cuda_on_host;
    const unsigned warp = threadIdx.x / kWarp, own = threadIdx.x;
    lanes[own] = value;
    of_warp[warp].wait(kWarp);
    value = *std::max_element(lanes + warp * kWarp, lanes + (warp + 1) * kWarp);
    of_warp[warp].wait(kWarp);
    return value;
}

static inline unsigned atomicMax(unsigned* at, unsigned value) {
    const unsigned old = *at;
    *at = max(old, value);
    return old;
}
