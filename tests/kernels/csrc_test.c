/* The kernels without torch, under sanitizers: against a plain loop in double, in buffers that are
 * exactly as large as fdb.h says. Built and run by test_sanitizers.py. */
#include "csrc_random.h"
#include "floats.h"

enum { CASES = 120 };

static const int64_t COLUMNS[] = {1, 1, 2, 3, 7, FDB_MAX_COLUMNS};

/* -- one product ------------------------------------------------------------------------------- */

typedef struct {
    const char *name;
    double tolerance;
    const fdb_kernel *kernel;
    const layer *l;
    int64_t columns, padded;
    float *x;
    int64_t bad_column; /* holds an input that is not finite; -1 for none */
} trial;

/* Runs the kernel with its work divided at `group` and `block`. */
static float *run(const trial *t, int64_t group, int64_t block) {
    const fdb_shape *s = &t->l->shape;
    int64_t words = t->padded / FDB_WORD_INPUTS, blocks = fdb_blocks(s);
    uint8_t *tables = table_memory(words * t->columns * t->kernel->table_bytes);
    float *steps = memory(t->l->groups * t->columns * 4);
    float *sums = memory(t->l->groups * t->columns * 4);
    float *y = memory(blocks * t->columns * FDB_BLOCK_ROWS * 4);
    fdb_inputs inputs = {tables, steps, sums};
    fdb_make_inputs(t->kernel, s, t->x, t->columns, group, t->l->groups, &inputs);
    fdb_make_inputs(t->kernel, s, t->x, t->columns, 0, group, &inputs);
    const uint8_t *tiles = t->l->tiles, *offsets = (const uint8_t *)t->l->offsets;
    fdb_make_product(t->kernel, s, tiles, offsets, &inputs, t->columns, block, blocks, y);
    fdb_make_product(t->kernel, s, tiles, offsets, &inputs, t->columns, 0, block, y);
    free(tables), free(steps), free(sums);
    return y;
}

static float output(const trial *t, const float *y, int64_t row, int64_t column) {
    int64_t block = row / FDB_BLOCK_ROWS;
    return y[(block * t->columns + column) * FDB_BLOCK_ROWS + row % FDB_BLOCK_ROWS];
}

static void fail(const trial *t, const char *what, double value) {
    const fdb_shape *s = &t->l->shape;
    FAIL("%s: %s (%g): %ld x %ld, groups of %ld, %ld columns", t->name, what, value,
         (long)s->out_features, (long)s->in_features, (long)s->group_size, (long)t->columns);
}

static void compare(const trial *t, const float *y) {
    const fdb_shape *s = &t->l->shape;
    double error = 0, size = 0;
    for (int64_t column = 0; column < t->columns; column++)
        for (int64_t row = 0; row < s->out_features; row++) {
            double expected = 0, found = output(t, y, row, column);
            if (column == t->bad_column) {
                if (!isnan(found)) fail(t, "not NaN", found);
                continue;
            }
            for (int64_t i = 0; i < s->in_features; i++) {
                double all = offset_of(t->l, row, i / s->group_size) *
                             t->x[column * t->padded + i];
                expected += all;
                size += all * all;
                for (int plane = 0; plane < 2; plane++) {
                    double term = scale_of(t->l, plane, row, i / s->group_size) *
                                  t->x[column * t->padded + i];
                    expected += bit_of(t->l, plane, row, i) ? term : 0;
                    size += term * term;
                }
            }
            error += (found - expected) * (found - expected);
        }
    if (!(sqrt(error) <= t->tolerance * sqrt(size))) fail(t, "error", sqrt(error / size));
}

static void compare_bytes(const trial *t, const float *y, const float *other) {
    for (int64_t column = 0; column < t->columns; column++)
        for (int64_t row = 0; row < t->l->shape.out_features; row++) {
            float a = output(t, y, row, column), b = output(t, other, row, column);
            if (column != t->bad_column && memcmp(&a, &b, sizeof a))
                fail(t, "another division gives other bytes", a - b);
        }
}

static void check_product(trial t) {
    const fdb_shape *s = &t.l->shape;
    t.columns = PICK(COLUMNS);
    t.padded = (s->in_features + FDB_WORD_INPUTS - 1) / FDB_WORD_INPUTS * FDB_WORD_INPUTS;
    t.x = memory(t.columns * t.padded * 4);
    double factor = ldexp(1, (int)below(120) - 60);
    for (int64_t i = 0; i < t.columns * t.padded; i++)
        t.x[i] = i % t.padded < s->in_features ? (float)(uniform() * factor) : 0;
    t.bad_column = below(3) ? -1 : (int64_t)below((uint64_t)t.columns);
    if (t.bad_column >= 0) {
        const float bad[] = {NAN, INFINITY, -INFINITY};
        t.x[t.bad_column * t.padded + (int64_t)below((uint64_t)s->in_features)] = PICK(bad);
    }
    float *y = run(&t, 0, 0);
    compare(&t, y);
    float *other = run(&t, (int64_t)below((uint64_t)t.l->groups + 1),
                       (int64_t)below((uint64_t)fdb_blocks(s) + 1));
    compare_bytes(&t, y, other);
    free(y), free(other), free(t.x);
}

/* -- attention --------------------------------------------------------------------------------- */

static double score_of(const attention_head *h, int64_t query, int64_t position) {
    const float *key = (const float *)(h->key + position * h->key_bytes);
    double sum = 0;
    for (int64_t i = 0; i < h->dim; i++) sum += (double)h->query[query * h->dim + i] * key[i];
    return h->mask != NULL && !h->mask[position] ? -INFINITY : sum;
}

static void compare_attention(const char *name, const attention_head *h) {
    for (int64_t query = 0; query < h->queries; query++) {
        double largest = -INFINITY, total = 0;
        for (int64_t p = 0; p < h->positions; p++) largest = fmax(largest, score_of(h, query, p));
        for (int64_t p = 0; p < h->positions; p++) total += exp(score_of(h, query, p) - largest);
        for (int64_t i = 0; i < h->dim; i++) {
            double expected = 0, found = h->out[query * h->dim + i];
            for (int64_t p = 0; p < h->positions; p++)
                expected += exp(score_of(h, query, p) - largest) / total *
                            ((const float *)(h->value + p * h->value_bytes))[i];
            if (!(fabs(found - expected) <= 1e-5))
                FAIL("%s: attention %g, not %g: %ld queries, %ld positions of %ld", name, found,
                     expected, (long)h->queries, (long)h->positions, (long)h->dim);
        }
    }
}

static void check_attention(const char *name, attention *attend) {
    static const int64_t dims[] = {1, 8, 15, 16, 33, 64, ATTENTION_MAX_DIM};
    attention_head h = {.queries = 1 + (int64_t)below(5), .positions = 1 + (int64_t)below(70)};
    h.dim = PICK(dims);
    h.key_bytes = h.value_bytes = h.dim * 4;
    float *key = memory(h.positions * h.key_bytes), *value = memory(h.positions * h.value_bytes);
    float *query = memory(h.queries * h.dim * 4);
    uint8_t *mask = memory(h.positions);
    for (int64_t i = 0; i < h.positions * h.dim; i++)
        key[i] = (float)uniform(), value[i] = (float)uniform();
    for (int64_t i = 0; i < h.queries * h.dim; i++) query[i] = (float)uniform();
    for (int64_t i = 0; i < h.positions; i++) mask[i] = i == 0 || below(2);
    h.key = (const char *)key, h.value = (const char *)value, h.query = query;
    h.mask = below(2) ? mask : NULL;
    h.scores = memory(h.queries * h.positions * 4), h.out = memory(h.queries * h.dim * 4);
    attend(&h);
    compare_attention(name, &h);
    free(key), free(value), free(query), free(mask), free(h.scores), free(h.out);
}

/* Their numbers are tested from Python: here they keep to their buffers. */
static void run_training(const fdb_instruction_set *set) {
    int bfloat16 = (int)below(2);
    int64_t count = 1 + (int64_t)below(150), bytes = bfloat16 ? 2 : 4;
    training_group group = {
        .count = count, .scales = {1, -0.5f, 0.1f}, .cells = {1, -0.4f, 0}, .bfloat16 = bfloat16};
    distillation_token token = {.count = count, .bfloat16 = bfloat16};
    float *latent = memory(count * 4), *to_latent = memory(count * 4);
    char *dense = memory(count * bytes), *gradient = memory(count * bytes);
    for (int64_t i = 0; i < count; i++) latent[i] = (float)uniform();
    group.latent = latent;
    const training_kernels *training = set->training;
    training->levels(&group, dense);
    training->gradients(&group, dense, to_latent);
    uint8_t *planes = memory((count + 7) / 8);
    training_group fixed = group;
    fixed.latent = NULL, fixed.plane1 = fixed.plane2 = planes;
    training->plane_levels(&fixed, dense);
    training->plane_gradients(&fixed, dense);
    free(planes);
    token.student = token.teacher = dense, token.gradient = gradient;
    training->distil(&token);
    if (!(fabsf(token.cross_entropy - token.teacher_entropy) <= 1e-4f))
        FAIL("%s: the cross-entropy to itself is %g", set->name, (double)token.cross_entropy);
    free(latent), free(to_latent), free(dense), free(gradient);
}

static void check_instruction_set(const fdb_instruction_set *set) {
    if (!set->supported()) {
        printf("%s: not here\n", set->name);
        return;
    }
    for (int exact = 0; exact < 2; exact++) {
        trial t = {.name = exact ? set->exact->name : set->integer->name,
                   .kernel = exact ? set->exact : set->integer,
                   .tolerance = exact ? 1e-6 : 6e-4};
        state = 88172645463325252u;
        for (int i = 0; i < CASES; i++) {
            layer l = random_layer();
            check_layout(&l);
            t.l = &l;
            check_product(t);
            free_layer(&l);
        }
    }
    for (int i = 0; i < CASES; i++) check_attention(set->name, set->attention);
    for (int i = 0; i < CASES; i++) run_training(set);
    printf("%s: right\n", set->name);
}

int main(void) {
    const fdb_instruction_set *sets[] = {&fdb_avx512, &fdb_avx2, &fdb_neon, &fdb_portable};
    for (size_t i = 0; i < sizeof sets / sizeof *sets; i++) check_instruction_set(sets[i]);
    return 0;
}
