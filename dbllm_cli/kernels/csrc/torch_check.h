/* What the operators require of their arguments: they are public, and read memory by its size. */
#ifndef DBLLM_TORCH_CHECK_H
#define DBLLM_TORCH_CHECK_H

#include "torch_abi.h"

/* Frees an operator's first `tensors` arguments and raises an error. */
_Noreturn void refuse(stable_value* stack, int tensors, const char* message);

/* In an operator, before anything is computed. */
#define REQUIRE(condition, tensors, message)                       \
    do {                                                           \
        if (!(condition)) refuse(stack, tensors, "dbllm: " message); \
    } while (0)

static inline int is_floating(const array* x) { return x->type <= FLOAT16; }

/* float32 or bfloat16. */
static inline int is_computed(const array* x) { return x->type <= BFLOAT16; }

/* Of these sizes, and contiguous. */
int has_sizes(const array* x, element_type type, int64_t dim, const int64_t* sizes);

/* A vector of `count` floats, or an empty one where it may be left out. */
int is_vector(const array* x, int64_t count, int optional);

/* Tiles of a layer, with offsets or without. */
int is_tiles(const array* x, int64_t in_features, int64_t out_features, int64_t group_size);

#endif
