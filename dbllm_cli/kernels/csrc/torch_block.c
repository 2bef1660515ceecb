/* A decoder block of packed layers for one token a sequence: what comes before the cache (norm,
 * queries, keys and values, rotation) and after it (attention, output, norm, gated feed-forward).
 * Between an operator's inputs and its outputs all numbers are float32.
 */
#include <math.h>
#include <string.h>

#include "attention.h"
#include "torch_attention.h"
#include "torch_check.h"
#include "torch_products.h"

typedef struct {
    array x, norm;
    const fdb_kernel* kernel;
    int64_t batch, hidden, group_size;
    float eps;
} block;

static void block_describe(block* b, stable_value hidden, stable_value norm, int64_t group_size,
                           stable_value eps) {
    double wide;
    memcpy(&wide, &eps, sizeof wide);
    array_describe((tensor)hidden, &b->x);
    array_describe((tensor)norm, &b->norm);
    b->kernel = b->x.type == FLOAT32 ? fdb_chosen->exact : fdb_chosen->integer;
    b->batch = b->x.sizes[0];
    b->hidden = b->x.sizes[b->x.dim - 1];
    b->group_size = group_size;
    b->eps = (float)wide;
}

/* One token of few sequences, and a norm of as many numbers. */
static int block_fits(const block* b) {
    return is_computed(&b->x) && b->x.dim == 3 && b->x.sizes[1] == 1 && b->batch > 0 &&
           b->batch <= FDB_MAX_COLUMNS && b->hidden > 0 && is_vector(&b->norm, b->hidden, 0);
}

static int tiles_fit(const block* b, stable_value tiles, int64_t in_features, int64_t out_features) {
    array own;
    array_describe((tensor)tiles, &own);
    return is_tiles(&own, in_features, out_features, b->group_size);
}

static int vector_fits(stable_value vector, int64_t count) {
    array own;
    array_describe((tensor)vector, &own);
    return is_vector(&own, count, 1);
}

static int angles_fit(const array* x, int64_t batch, int64_t dim) {
    return is_floating(x) && x->dim == 3 && (x->sizes[0] == 1 || x->sizes[0] == batch) &&
           x->sizes[1] == 1 && x->sizes[2] == dim;
}

/* Parts of one piece of work memory, handed out in order. */
static float* take(char** memory, int64_t count) {
    float* part = (float*)*memory;
    *memory += work_bytes(count * 4);
    return part;
}

static void normalize(float* x, const float* weight, int64_t count, float eps) {
    float factor = 1 / sqrtf(attention_dot(x, x, count) / (float)count + eps);
    for (int64_t i = 0; i < count; i++) x[i] *= factor * weight[i];
}

/* Normalized rows [batch][products_row] for a product. */
static void normalized_rows(const block* b, const float* hidden, float* weight, float* x) {
    int64_t row = products_row(b->hidden);
    array_read(&b->norm, 0, b->hidden, weight);
    for (int64_t i = 0; i < b->batch; i++) {
        float* own = x + i * row;
        memcpy(own, hidden + i * b->hidden, (size_t)b->hidden * sizeof *own);
        normalize(own, weight, b->hidden, b->eps);
        memset(own + b->hidden, 0, (size_t)(row - b->hidden) * sizeof *own);
    }
}

static products products_of(const block* b, int64_t in_features, float* x) {
    return (products){.kernel = b->kernel,
                      .in_features = in_features,
                      .group_size = b->group_size,
                      .columns = b->batch,
                      .x = x,
                      .type = FLOAT32};
}

static void add_matrix(products* p, stable_value tiles, int64_t out_features, float* out) {
    array own;
    array_describe((tensor)tiles, &own);
    products_add(p, &own, out_features, (char*)out);
}

/* -- before the cache -------------------------------------------------------------------------- */

/* Heads [batch][heads][dim] after their product. */
typedef struct {
    float* x;
    int64_t batch, heads, dim;
} head_rows;

static void add_bias(const head_rows* h, stable_value bias, float* work) {
    array own;
    array_describe((tensor)bias, &own);
    if (own.sizes[0] == 0) return;
    array_read(&own, 0, h->heads * h->dim, work);
    for (int64_t b = 0; b < h->batch; b++)
        for (int64_t i = 0; i < h->heads * h->dim; i++) h->x[b * h->heads * h->dim + i] += work[i];
}

static void normalize_heads(const head_rows* h, stable_value norm, float eps, float* work) {
    array own;
    array_describe((tensor)norm, &own);
    if (own.sizes[0] == 0) return;
    array_read(&own, 0, h->dim, work);
    for (int64_t i = 0; i < h->batch * h->heads; i++)
        normalize(h->x + i * h->dim, work, h->dim, eps);
}

/* Rotary positions: the halves of a head are turned by the angles of cos and sin [dim]. */
static void rotate(const head_rows* h, const array* cos, const array* sin, float* work) {
    int64_t half = h->dim / 2;
    float *c = work, *s = work + h->dim;
    for (int64_t b = 0; b < h->batch; b++) {
        int64_t row = cos->sizes[0] > 1 ? b : 0;
        array_read(cos, row, h->dim, c);
        array_read(sin, row, h->dim, s);
        for (int64_t head = 0; head < h->heads; head++) {
            float* x = h->x + (b * h->heads + head) * h->dim;
            for (int64_t i = 0; i < half; i++) {
                float first = x[i], second = x[i + half];
                x[i] = first * c[i] - second * s[i];
                x[i + half] = second * c[i + half] + first * s[i + half];
            }
        }
    }
}

static tensor heads_tensor(const head_rows* h, element_type type) {
    char* data;
    tensor result = array_new((int64_t[]){h->batch, h->heads, 1, h->dim}, 4, type, &data);
    array_write(h->x, h->batch * h->heads * h->dim, 1, type, data, 0);
    return result;
}

void block_before_cache(stable_value* stack, uint64_t inputs, uint64_t outputs) {
    enum { HIDDEN, NORM, TILES, BIAS = 5, HEAD_NORM = 8, COS = 10, SIN, TENSORS };
    (void)inputs, (void)outputs;
    int64_t heads = (int64_t)stack[12], key_heads = (int64_t)stack[13], dim = (int64_t)stack[14];
    block b;
    array cos, sin;
    block_describe(&b, stack[HIDDEN], stack[NORM], (int64_t)stack[15], stack[16]);
    array_describe((tensor)stack[COS], &cos);
    array_describe((tensor)stack[SIN], &sin);
    int fits = block_fits(&b) && heads > 0 && key_heads > 0 && dim > 0 && dim % 2 == 0 &&
               angles_fit(&cos, b.batch, dim) && angles_fit(&sin, b.batch, dim) &&
               cos.sizes[0] == sin.sizes[0];
    for (int i = 0; fits && i < PRODUCTS_MATRICES; i++) {
        int64_t own = (i == 0 ? heads : key_heads) * dim;
        fits = tiles_fit(&b, stack[TILES + i], b.hidden, own) && vector_fits(stack[BIAS + i], own);
        if (i < 2) fits = fits && vector_fits(stack[HEAD_NORM + i], dim);
    }
    REQUIRE(fits, TENSORS, "block_before_cache got tensors that do not fit each other");
    int64_t widest = heads * dim > b.hidden ? heads * dim : b.hidden;
    widest = widest > 2 * dim ? widest : 2 * dim;
    int64_t numbers = b.hidden + products_row(b.hidden) + 3 * heads * dim;
    char* memory = work_memory(
        WORK_INPUTS, work_bytes(widest * 4) + (size_t)b.batch * work_bytes(numbers * 4) + 8 * 64);
    float *work = take(&memory, widest), *hidden = take(&memory, b.batch * b.hidden);
    float* x = take(&memory, b.batch * products_row(b.hidden));
    for (int64_t i = 0; i < b.batch; i++) array_read(&b.x, i, b.hidden, hidden + i * b.hidden);
    normalized_rows(&b, hidden, work, x);
    products p = products_of(&b, b.hidden, x);
    head_rows rows[PRODUCTS_MATRICES];
    for (int i = 0; i < PRODUCTS_MATRICES; i++) {
        int64_t own = i == 0 ? heads : key_heads;
        rows[i] = (head_rows){take(&memory, b.batch * own * dim), b.batch, own, dim};
        add_matrix(&p, stack[TILES + i], own * dim, rows[i].x);
    }
    products_multiply(&p);
    tensor results[PRODUCTS_MATRICES];
    for (int i = 0; i < PRODUCTS_MATRICES; i++) {
        add_bias(&rows[i], stack[BIAS + i], work);
        if (i < 2) {
            normalize_heads(&rows[i], stack[HEAD_NORM + i], b.eps, work);
            rotate(&rows[i], &cos, &sin, work);
        }
        results[i] = heads_tensor(&rows[i], b.x.type);
    }
    for (int i = 0; i < TENSORS; i++) torch.delete_tensor((tensor)stack[i]);
    for (int i = 0; i < PRODUCTS_MATRICES; i++) stack[i] = (stable_value)results[i];
}

/* -- after the cache --------------------------------------------------------------------------- */

/* hidden += tiles x, whose rows [batch][in_features] are not padded yet. */
static void add_product(const block* b, stable_value tiles, const float* from, int64_t in_features,
                        float* x, float* out, float* hidden) {
    int64_t row = products_row(in_features);
    for (int64_t i = 0; i < b->batch; i++) {
        memcpy(x + i * row, from + i * in_features, (size_t)in_features * sizeof *x);
        memset(x + i * row + in_features, 0, (size_t)(row - in_features) * sizeof *x);
    }
    products p = products_of(b, in_features, x);
    add_matrix(&p, tiles, b->hidden, out);
    products_multiply(&p);
    for (int64_t i = 0; i < b->batch * b->hidden; i++) hidden[i] += out[i];
}

void block_after_cache(stable_value* stack, uint64_t inputs, uint64_t outputs) {
    enum { HIDDEN, QUERY, MASK = 4, OUTPUT, NORM, GATE, UP, DOWN, TENSORS };
    (void)inputs, (void)outputs;
    block b;
    array query;
    double scale;
    int64_t inner = (int64_t)stack[10];
    block_describe(&b, stack[HIDDEN], stack[NORM], (int64_t)stack[11], stack[12]);
    memcpy(&scale, &stack[13], sizeof scale);
    array_describe((tensor)stack[QUERY], &query);
    int fits = block_fits(&b) && attention_fits(stack + QUERY, &query) &&
               query.sizes[0] == b.batch && inner > 0 &&
               tiles_fit(&b, stack[OUTPUT], query.sizes[1] * query.sizes[3], b.hidden) &&
               tiles_fit(&b, stack[GATE], b.hidden, inner) &&
               tiles_fit(&b, stack[UP], b.hidden, inner) &&
               tiles_fit(&b, stack[DOWN], inner, b.hidden);
    REQUIRE(fits, TENSORS, "block_after_cache got tensors that do not fit each other");
    int64_t heads = query.sizes[1] * query.sizes[3], widest = heads > inner ? heads : inner;
    widest = widest > b.hidden ? widest : b.hidden;
    char* memory = work_memory(WORK_INPUTS, 6 * work_bytes(b.batch * products_row(widest) * 4));
    float *hidden = take(&memory, b.batch * b.hidden),
          *x = take(&memory, b.batch * products_row(widest));
    float *gate = take(&memory, b.batch * widest), *up = take(&memory, b.batch * widest);
    float *work = take(&memory, b.hidden), *out = take(&memory, b.batch * b.hidden);
    for (int64_t i = 0; i < b.batch; i++) array_read(&b.x, i, b.hidden, hidden + i * b.hidden);
    attention_run(stack + QUERY, &query, (float)scale, gate, up);
    add_product(&b, stack[OUTPUT], up, heads, x, out, hidden);
    normalized_rows(&b, hidden, work, x);
    products p = products_of(&b, b.hidden, x);
    add_matrix(&p, stack[GATE], inner, gate);
    add_matrix(&p, stack[UP], inner, up);
    products_multiply(&p);
    fdb_chosen->gated_silu(gate, up, b.batch * inner);
    add_product(&b, stack[DOWN], gate, inner, x, out, hidden);
    int64_t rows;
    char* data;
    tensor result = array_like(&b.x, b.hidden, &rows, &data);
    array_write(hidden, b.batch * b.hidden, 1, b.x.type, data, 0);
    for (int i = 0; i < TENSORS; i++) torch.delete_tensor((tensor)stack[i]);
    stack[0] = (stable_value)result;
}
