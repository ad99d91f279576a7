// The flat C interface of the ops. Every function returns a cudaError_t as int (0 is success),
// takes raw pointers and 64-bit sizes, and launches on the given stream of the current device. The
// `_host` form of each runs the same arithmetic over host memory.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum Phi4Float { PHI4_FLOAT32 = 0, PHI4_BFLOAT16 = 1 };
enum Phi4Scaling { PHI4_PER_TENSOR = 0, PHI4_PER_LINE = 1, PHI4_PER_TILE = 2 };

typedef struct {
    float* param;            // [n] master weights
    float* exp_avg;          // [n]
    float* exp_avg_sq;       // [n]
    const void* grad;        // [n] of grad_type
    void* weight;            // [n] bf16, written with the new parameters; may be null
    uint8_t* fp8;            // [n] e4m3, written with the new parameters; may be null
    const float* fp8_scale;  // [] multiplies the parameters, with fp8
    float* fp8_amax;         // [] raised to max |param|, with fp8; never lowered
    int64_t n;
} Phi4AdamWShard;

typedef struct {
    int grad_type;
    const float* grad_scale;  // [] multiplies the gradient; null means 1
    const float* found_inf;   // [] not 0: nothing is written; may be null
    const double* device_lr;  // [] read when the kernel runs, in place of lr; may be null
    const int64_t* device_step;
    double lr, beta1, beta2, eps, weight_decay;
    int64_t step;  // of this update; the first is 1
} Phi4AdamWStep;

int phi4_adamw(const Phi4AdamWShard* shards, int64_t num_shards, const Phi4AdamWStep* step,
               void* stream);
int phi4_adamw_host(const Phi4AdamWShard* shards, int64_t num_shards, const Phi4AdamWStep* step);

// Sum of squares over num_tensors tensors of one type, in two passes whose order depends on the
// sizes alone. partials: phi4_square_sum_partials() doubles of scratch. total: one double.
int64_t phi4_square_sum_partials(const int64_t* sizes, int64_t num_tensors);
int phi4_square_sum(const void* const* tensors, const int64_t* sizes, int64_t num_tensors, int type,
                    double* partials, double* total, void* stream);
int phi4_square_sum_host(const void* const* tensors, const int64_t* sizes, int64_t num_tensors,
                         int type, double* partials, double* total);

typedef struct {
    const void* x;  // [rows, columns] of x_type
    int64_t rows, columns;
    int x_type;
    int scaling;
    int e5m2;                // e4m3 otherwise
    const float* scale;      // [] multiplies x; PHI4_PER_TENSOR only
    uint8_t* rowwise;        // [rows, columns]
    uint8_t* columnwise;     // [columns, rows]; may be null
    float* inverse;          // per line: [rows, columns / 128 up]; per tile: [rows / 128 up, same]
    float* inverse_columns;  // per line: [columns, rows / 128 up], with columnwise
    float* amax;             // [] max |x|
} Phi4Fp8Cast;

int phi4_fp8_cast(const Phi4Fp8Cast* call, void* stream);
int phi4_fp8_cast_host(const Phi4Fp8Cast* call);
int phi4_fp8_tile_slot(int row, int column);  // where a 128 x 128 tile keeps an element

#ifdef __cplusplus
}
#endif
