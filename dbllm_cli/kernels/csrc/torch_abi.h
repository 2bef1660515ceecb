/* What the operators need of torch: its stable C ABI, declared here, so that the package builds
 * without torch's headers and the library runs with any torch from 2.10 on
 * (torch/csrc/inductor/aoti_torch/c/shim.h, torch/csrc/stable/c/shim.h). */
#ifndef DBLLM_TORCH_ABI_H
#define DBLLM_TORCH_ABI_H

#include <stddef.h>
#include <stdint.h>

typedef uint64_t stable_value;
typedef void* tensor;
typedef void (*range_function)(int64_t begin, int64_t end, void* context);
typedef void (*boxed_function)(stable_value* stack, uint64_t inputs, uint64_t outputs);

typedef struct {
    int32_t (*library_init_impl)(const char*, const char*, const char*, uint32_t, void**);
    int32_t (*library_impl)(void*, const char*, boxed_function);
    int32_t (*delete_tensor)(tensor);
    int32_t (*data_ptr)(tensor, void**);
    int32_t (*dim)(tensor, int64_t*);
    int32_t (*sizes)(tensor, int64_t**);
    int32_t (*strides)(tensor, int64_t**);
    int32_t (*dtype)(tensor, int32_t*);
    int32_t (*empty)(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, tensor*);
    int32_t (*threads)(uint32_t*);
    int32_t (*parallel_for)(int64_t, int64_t, int64_t, range_function, void*);
    int32_t (*float32)(void);
    int32_t (*bfloat16)(void);
    int32_t (*float16)(void);
    int32_t (*uint8)(void);
    int32_t (*boolean)(void);
    void (*throw_error)(const char*); /* std::runtime_error, which torch makes a RuntimeError */
} torch_abi;

extern torch_abi torch;

/* Finds the functions. NULL, or the name of what this torch lacks. */
const char* torch_abi_load(const char* torch_library);

typedef enum { FLOAT32, BFLOAT16, FLOAT16, UINT8, BOOLEAN, OTHER } element_type;

enum { ARRAY_MAX_DIM = 64 };

typedef struct {
    char* data;
    element_type type;
    int64_t dim, sizes[ARRAY_MAX_DIM], strides[ARRAY_MAX_DIM];
} array;

static inline int64_t array_element_bytes(const array* x) {
    return x->type == FLOAT32 ? 4 : x->type == BFLOAT16 || x->type == FLOAT16 ? 2 : 1;
}

void array_describe(tensor from, array* to);

/* A contiguous array. */
tensor array_new(const int64_t* sizes, int64_t dim, element_type type, char** data);

/* A contiguous array of x's type and leading dimensions, with `last` in place of its last. */
tensor array_like(const array* x, int64_t last, int64_t* rows, char** data);

/* Row `row` of the flattened leading dimensions, as float32. */
void array_read(const array* x, int64_t row, int64_t count, float* to);

/* Makes numbers larger where all are so small that steps would be denormal: what to multiply
 * results by. */
float array_lift(float* x, int64_t count);

/* Floats times `factor` to elements of a contiguous array; changes them. */
void array_write(float* from, int64_t count, float factor, element_type type, char* data,
                 int64_t at);

/* The operators of torch_attention.c, torch_block.c, torch_int8.c and torch_training.c. */
void attend_one_cpu(stable_value* stack, uint64_t inputs, uint64_t outputs);
void block_after_cache(stable_value* stack, uint64_t inputs, uint64_t outputs);
void block_before_cache(stable_value* stack, uint64_t inputs, uint64_t outputs);
void distillation_cpu(stable_value* stack, uint64_t inputs, uint64_t outputs);
void int8_linear_cpu(stable_value* stack, uint64_t inputs, uint64_t outputs);
void latent_gradients_cpu(stable_value* stack, uint64_t inputs, uint64_t outputs);
void plane_gradients_cpu(stable_value* stack, uint64_t inputs, uint64_t outputs);
void plane_levels_cpu(stable_value* stack, uint64_t inputs, uint64_t outputs);
void latent_levels_cpu(stable_value* stack, uint64_t inputs, uint64_t outputs);

/* Bytes of a part of work memory, so that the next part is aligned too. */
static inline size_t work_bytes(int64_t bytes) { return ((size_t)bytes + 63) / 64 * 64; }

/* Who may hold work memory at the same time. */
typedef enum { WORK_INPUTS, WORK_ATTENTION, WORK_PRODUCTS, WORK_USES } work_use;

/* Memory of the calling thread, 64-byte aligned, kept for its next call. */
void* work_memory(work_use use, size_t bytes);

#endif
