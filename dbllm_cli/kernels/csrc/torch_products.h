/* Products of packed matrices with the same inputs, on torch's threads. */
#ifndef DBLLM_TORCH_PRODUCTS_H
#define DBLLM_TORCH_PRODUCTS_H

#include "fdb.h"
#include "torch_abi.h"

enum { PRODUCTS_MATRICES = 3 };

typedef struct {
    const uint8_t *tiles, *offsets; /* behind the tiles, or NULL */
    int64_t out_features;
    char* out; /* [columns][out_features] of `type` */
    float* y;
} packed_matrix;

typedef struct {
    const fdb_kernel* kernel;
    int64_t in_features, group_size, columns;
    float* x; /* [columns][products_row], zero beyond in_features; changed where it is tiny */
    element_type type;
    int64_t count;
    packed_matrix matrix[PRODUCTS_MATRICES];
    float lowered[FDB_MAX_COLUMNS];
    fdb_inputs inputs;
} products;

/* Numbers from row to row of x. */
static inline int64_t products_row(int64_t in_features) {
    return fdb_ceil_div(in_features, FDB_WORD_INPUTS) * FDB_WORD_INPUTS;
}

/* Adds the matrix of `tiles`, whose inputs are p's. */
void products_add(products* p, const array* tiles, int64_t out_features, char* out);

void products_multiply(products* p);

#endif
