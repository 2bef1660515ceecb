/* dbllm::plane_levels_cpu(Tensor planes, Tensor alpha, int in_features, int group_size,
 *   bool bfloat16) -> Tensor
 * dbllm::plane_gradients_cpu(Tensor dense, Tensor planes, Tensor alpha, int group_size) -> Tensor
 * dbllm::latent_levels_cpu(Tensor latent, Tensor alpha, Tensor cells, int group_size,
 *   bool bfloat16) -> Tensor
 * dbllm::latent_gradients_cpu(Tensor dense, Tensor latent, Tensor alpha, Tensor cells,
 *   int group_size) -> (Tensor, Tensor)
 * dbllm::distillation_cpu(Tensor student, Tensor teacher, bool gradient) -> (Tensor, Tensor)
 * All inputs are contiguous. */
#include "fdb.h"
#include "torch_check.h"

enum { GRAIN = 1 << 16 }; /* weights: fewer are not worth waking another thread */

typedef struct {
    const float *latent, *alpha, *cells; /* latent and cells: NULL where there are planes */
    const uint8_t* planes;
    char* dense;
    float *to_latent, *to_alpha;
    int64_t rows, in, groups, group_size, scales; /* of a group: 2, or 3 with an offset */
    element_type type;
} call;

static group_scales scales_of(const call* c, const float* alpha, int64_t row, int64_t group) {
    int64_t scale = row * c->groups + group, next = c->rows * c->groups;
    float beta = c->scales == 3 ? alpha[2 * next + scale] : 0;
    return (group_scales){alpha[scale], alpha[next + scale], beta};
}

static training_group group_of(const call* c, int64_t row, int64_t group) {
    int64_t first = group * c->group_size, bytes = fdb_ceil_div(c->in, 8);
    training_group g = {
        .count = fdb_min(c->group_size, c->in - first),
        .scales = scales_of(c, c->alpha, row, group),
        .bfloat16 = c->type == BFLOAT16,
    };
    if (c->latent != NULL) {
        g.latent = c->latent + row * c->in + first;
        g.cells = scales_of(c, c->cells, row, group);
    } else {
        g.plane1 = c->planes + row * bytes + first / 8;
        g.plane2 = g.plane1 + c->rows * bytes;
    }
    return g;
}

static char* dense_at(const call* c, int64_t row, int64_t group) {
    return c->dense + (row * c->in + group * c->group_size) * (c->type == BFLOAT16 ? 2 : 4);
}

static void make_levels(int64_t first, int64_t last, void* context) {
    const call* c = context;
    const training_kernels* kernels = fdb_chosen->training;
    for (int64_t row = first; row < last; row++)
        for (int64_t i = 0; i < c->groups; i++) {
            training_group group = group_of(c, row, i);
            void* dense = dense_at(c, row, i);
            if (c->latent != NULL)
                kernels->levels(&group, dense);
            else
                kernels->plane_levels(&group, dense);
        }
}

static void write_scales(const call* c, int64_t row, int64_t group, group_scales sums) {
    int64_t next = c->rows * c->groups;
    float* to = c->to_alpha + row * c->groups + group;
    to[0] = sums.alpha1;
    to[next] = sums.alpha2;
    if (c->scales == 3) to[2 * next] = sums.beta;
}

static void make_gradients(int64_t first, int64_t last, void* context) {
    const call* c = context;
    const training_kernels* kernels = fdb_chosen->training;
    for (int64_t row = first; row < last; row++)
        for (int64_t i = 0; i < c->groups; i++) {
            training_group group = group_of(c, row, i);
            const void* dense = dense_at(c, row, i);
            if (c->latent != NULL) {
                float* latent = c->to_latent + (group.latent - c->latent);
                write_scales(c, row, i, kernels->gradients(&group, dense, latent));
            } else {
                write_scales(c, row, i, kernels->plane_gradients(&group, dense));
            }
        }
}

/* What latent weights and planes have in common: the scales. */
static call call_of(const array* scales, int64_t in, int64_t group_size) {
    return (call){
        .alpha = (const float*)scales->data,
        .rows = scales->sizes[1],
        .in = in,
        .groups = scales->sizes[2],
        .scales = scales->sizes[0],
        .group_size = group_size,
    };
}

/* Whether sizes are a matrix's and those of its scales, with an offset or without. */
static int are_sizes(const array* scales, int64_t rows, int64_t in, int64_t group_size) {
    if (in <= 0 || group_size <= 0 || scales->dim != 3) return 0;
    if (scales->sizes[0] != 2 && scales->sizes[0] != 3) return 0;
    return has_sizes(scales, FLOAT32, 3,
                     (int64_t[]){scales->sizes[0], rows, fdb_ceil_div(in, group_size)});
}

static int is_matrix(const array* x, element_type type) {
    return x->dim == 2 && has_sizes(x, type, 2, x->sizes);
}

static int is_dense(const array* x, int64_t rows, int64_t in) {
    return is_computed(x) && has_sizes(x, x->type, 2, (int64_t[]){rows, in});
}

static int are_planes(const array* bits, int64_t rows, int64_t in, int64_t group_size) {
    return group_size % 8 == 0 &&
           has_sizes(bits, UINT8, 3, (int64_t[]){2, rows, fdb_ceil_div(in, 8)});
}

static void for_all_rows(call* c, range_function function) {
    torch.parallel_for(0, c->rows, 1 + GRAIN / (c->in + 1), function, c);
}

void latent_levels_cpu(stable_value* stack, uint64_t inputs, uint64_t outputs) {
    (void)inputs, (void)outputs;
    array weights, scales, cells;
    array_describe((tensor)stack[0], &weights);
    array_describe((tensor)stack[2], &cells);
    array_describe((tensor)stack[1], &scales);
    REQUIRE(is_matrix(&weights, FLOAT32) &&
                are_sizes(&scales, weights.sizes[0], weights.sizes[1], (int64_t)stack[3]) &&
                has_sizes(&cells, FLOAT32, 3, scales.sizes),
            3, "latent_levels got latent weights, scales and cells that do not fit each other");
    call c = call_of(&scales, weights.sizes[1], (int64_t)stack[3]);
    c.latent = (const float*)weights.data, c.cells = (const float*)cells.data;
    c.type = stack[4] & 1 ? BFLOAT16 : FLOAT32;
    tensor result = array_new(weights.sizes, 2, c.type, &c.dense);
    for_all_rows(&c, make_levels);
    for (int i = 0; i < 3; i++) torch.delete_tensor((tensor)stack[i]);
    stack[0] = (stable_value)result;
}

void latent_gradients_cpu(stable_value* stack, uint64_t inputs, uint64_t outputs) {
    (void)inputs, (void)outputs;
    array dense, weights, scales, cells;
    array_describe((tensor)stack[0], &dense);
    array_describe((tensor)stack[1], &weights);
    array_describe((tensor)stack[3], &cells);
    array_describe((tensor)stack[2], &scales);
    REQUIRE(is_matrix(&weights, FLOAT32) && is_dense(&dense, weights.sizes[0], weights.sizes[1]) &&
                are_sizes(&scales, weights.sizes[0], weights.sizes[1], (int64_t)stack[4]) &&
                has_sizes(&cells, FLOAT32, 3, scales.sizes),
            4, "latent_gradients got tensors that do not fit each other");
    call c = call_of(&scales, weights.sizes[1], (int64_t)stack[4]);
    c.latent = (const float*)weights.data, c.cells = (const float*)cells.data;
    c.type = dense.type, c.dense = dense.data;
    tensor to_latent = array_new(weights.sizes, 2, FLOAT32, (char**)&c.to_latent);
    tensor to_alpha = array_new(scales.sizes, 3, FLOAT32, (char**)&c.to_alpha);
    for_all_rows(&c, make_gradients);
    for (int i = 0; i < 4; i++) torch.delete_tensor((tensor)stack[i]);
    stack[0] = (stable_value)to_latent;
    stack[1] = (stable_value)to_alpha;
}

void plane_levels_cpu(stable_value* stack, uint64_t inputs, uint64_t outputs) {
    (void)inputs, (void)outputs;
    tensor planes = (tensor)stack[0], alpha = (tensor)stack[1];
    array bits, scales;
    array_describe(planes, &bits);
    array_describe(alpha, &scales);
    REQUIRE(scales.dim == 3 &&
                are_sizes(&scales, scales.sizes[1], (int64_t)stack[2], (int64_t)stack[3]) &&
                are_planes(&bits, scales.sizes[1], (int64_t)stack[2], (int64_t)stack[3]),
            2, "plane_levels got planes and scales that do not fit each other");
    call c = call_of(&scales, (int64_t)stack[2], (int64_t)stack[3]);
    c.planes = (const uint8_t*)bits.data;
    c.type = stack[4] & 1 ? BFLOAT16 : FLOAT32;
    tensor result = array_new((int64_t[]){c.rows, c.in}, 2, c.type, &c.dense);
    for_all_rows(&c, make_levels);
    torch.delete_tensor(planes);
    torch.delete_tensor(alpha);
    stack[0] = (stable_value)result;
}

void plane_gradients_cpu(stable_value* stack, uint64_t inputs, uint64_t outputs) {
    (void)inputs, (void)outputs;
    array dense, bits, scales;
    array_describe((tensor)stack[0], &dense);
    array_describe((tensor)stack[1], &bits);
    array_describe((tensor)stack[2], &scales);
    REQUIRE(dense.dim == 2 && is_dense(&dense, dense.sizes[0], dense.sizes[1]) &&
                are_sizes(&scales, dense.sizes[0], dense.sizes[1], (int64_t)stack[3]) &&
                are_planes(&bits, dense.sizes[0], dense.sizes[1], (int64_t)stack[3]),
            3, "plane_gradients got tensors that do not fit each other");
    call c = call_of(&scales, dense.sizes[1], (int64_t)stack[3]);
    c.planes = (const uint8_t*)bits.data;
    c.type = dense.type, c.dense = dense.data;
    tensor to_alpha = array_new(scales.sizes, 3, FLOAT32, (char**)&c.to_alpha);
    for_all_rows(&c, make_gradients);
    for (int i = 0; i < 3; i++) torch.delete_tensor((tensor)stack[i]);
    stack[0] = (stable_value)to_alpha;
}

typedef struct {
    const char *student, *teacher;
    int64_t rows, count, bytes;
    element_type type;
    float* terms; /* [3][rows] */
    char* gradient;
} logits;

static void make_terms(int64_t first, int64_t last, void* context) {
    const logits* l = context;
    for (int64_t row = first; row < last; row++) {
        int64_t at = row * l->count * l->bytes;
        distillation_token token = {
            .student = l->student + at,
            .teacher = l->teacher + at,
            .count = l->count,
            .bfloat16 = l->type == BFLOAT16,
            .gradient = l->gradient == NULL ? NULL : l->gradient + at,
        };
        fdb_chosen->training->distil(&token);
        l->terms[row] = token.cross_entropy;
        l->terms[l->rows + row] = token.teacher_entropy;
        l->terms[2 * l->rows + row] = token.student_entropy;
    }
}

void distillation_cpu(stable_value* stack, uint64_t inputs, uint64_t outputs) {
    (void)inputs, (void)outputs;
    array student, teacher;
    array_describe((tensor)stack[0], &student);
    array_describe((tensor)stack[1], &teacher);
    REQUIRE(is_computed(&student) && is_matrix(&student, student.type) &&
                has_sizes(&teacher, student.type, 2, student.sizes),
            2, "distillation takes logits of two models, contiguous, of one dtype and shape");
    int wanted = stack[2] & 1;
    logits l = {
        .student = student.data,
        .teacher = teacher.data,
        .rows = student.sizes[0],
        .count = student.sizes[1],
        .bytes = array_element_bytes(&student),
        .type = student.type,
    };
    char* data;
    tensor terms = array_new((int64_t[]){3, l.rows}, 2, FLOAT32, (char**)&l.terms);
    tensor gradient = array_new((int64_t[]){wanted ? l.rows : 0, l.count}, 2, student.type, &data);
    l.gradient = wanted ? data : NULL;
    torch.parallel_for(0, l.rows, 1 + GRAIN / (l.count + 1), make_terms, &l);
    for (int i = 0; i < 2; i++) torch.delete_tensor((tensor)stack[i]);
    stack[0] = (stable_value)terms;
    stack[1] = (stable_value)gradient;
}
