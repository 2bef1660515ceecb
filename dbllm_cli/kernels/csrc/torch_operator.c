/* dbllm::fdb_linear_tiled(Tensor x, Tensor tiles, int out_features, int group_size) -> Tensor */
#include <string.h>

#include "torch_check.h"
#include "torch_products.h"

const fdb_instruction_set* fdb_chosen;

enum { GRAIN_INPUTS = 1 << 15 }; /* numbers read: less is not worth waking another thread */

typedef struct {
    const array* input;
    products products; /* `columns` of a chunk; the last may have fewer */
    int64_t rows, first_row;
    char* out;
} call;

static void read_columns(int64_t first, int64_t last, void* context) {
    const call* c = context;
    int64_t inputs = c->products.in_features, row = products_row(inputs);
    for (int64_t column = first; column < last; column++) {
        float* x = c->products.x + column * row;
        array_read(c->input, c->first_row + column, inputs, x);
        memset(x + inputs, 0, (size_t)(row - inputs) * sizeof *x);
    }
}

static void multiply_chunks(int64_t first, int64_t last, void* context) {
    const call* all = context;
    for (int64_t chunk = first; chunk < last; chunk++) {
        call c = *all;
        products* p = &c.products;
        c.first_row = chunk * p->columns;
        p->columns = fdb_min(p->columns, c.rows - c.first_row);
        p->x = work_memory(WORK_INPUTS, work_bytes(p->columns * products_row(p->in_features) * 4));
        p->matrix[0].out =
            c.out + c.first_row * p->matrix[0].out_features * array_element_bytes(c.input);
        torch.parallel_for(0, p->columns, 1 + GRAIN_INPUTS / p->in_features, read_columns, &c);
        products_multiply(p);
    }
}

/* Whole chunks of columns on each thread where there are enough of them, else all threads on one
 * chunk after the other. The chunks are the same for any number of threads. */
static void multiply(call* c) {
    uint32_t threads;
    int64_t chunks = fdb_ceil_div(c->rows, FDB_MAX_COLUMNS);
    if (chunks > 1) chunks += chunks % 2;
    c->products.columns = fdb_ceil_div(c->rows, chunks);
    chunks = fdb_ceil_div(c->rows, c->products.columns);
    torch.threads(&threads);
    if (chunks >= threads)
        torch.parallel_for(0, chunks, 1, multiply_chunks, c);
    else
        multiply_chunks(0, chunks, c);
}

static void fdb_linear_tiled(stable_value* stack, uint64_t inputs, uint64_t outputs) {
    (void)inputs, (void)outputs;
    tensor x = (tensor)stack[0], tiles = (tensor)stack[1];
    array input, weights;
    array_describe(x, &input);
    array_describe(tiles, &weights);
    REQUIRE(is_floating(&input) && input.dim > 0, 2,
            "fdb_linear_tiled takes an input in float32, bfloat16 or float16");
    REQUIRE(is_tiles(&weights, input.sizes[input.dim - 1], (int64_t)stack[2], (int64_t)stack[3]), 2,
            "fdb_linear_tiled got tiles of another layer than its sizes say");
    call c = {.input = &input};
    c.products = (products){
        .kernel = input.type == FLOAT32 ? fdb_chosen->exact : fdb_chosen->integer,
        .in_features = input.sizes[input.dim - 1],
        .group_size = (int64_t)stack[3],
        .type = input.type,
    };
    products_add(&c.products, &weights, (int64_t)stack[2], NULL);
    tensor result = array_like(&input, c.products.matrix[0].out_features, &c.rows, &c.out);
    if (c.rows > 0) multiply(&c);
    torch.delete_tensor(x);
    torch.delete_tensor(tiles);
    stack[0] = (stable_value)result;
}

static const fdb_instruction_set* const sets[] = {&fdb_avx512, &fdb_avx2, &fdb_neon, &fdb_portable};

/* Whether this processor has an instruction set; changes nothing. */
EXPORT int dbllm_supports(const char* name) {
    for (size_t i = 0; i < sizeof sets / sizeof *sets; i++)
        if (strcmp(name, sets[i]->name) == 0) return sets[i]->supported();
    return 0;
}

/* Chooses an instruction set: the best one when `name` is NULL. Its name, or NULL. */
EXPORT const char* dbllm_choose(const char* name) {
    for (size_t i = 0; i < sizeof sets / sizeof *sets; i++)
        if (sets[i]->supported() && (name == NULL || strcmp(name, sets[i]->name) == 0)) {
            fdb_chosen = sets[i];
            return fdb_chosen->name;
        }
    return NULL;
}

/* Registers the operators' CPU implementations. NULL, or the name of what this torch lacks. */
EXPORT const char* dbllm_register(const char* torch_library) {
    void* library;
    const char* lacking = torch_abi_load(torch_library);
    if (lacking != NULL) return lacking;
    if (torch.library_init_impl("dbllm", "CPU", __FILE__, __LINE__, &library) ||
        torch.library_impl(library, "fdb_linear_tiled", fdb_linear_tiled) ||
        torch.library_impl(library, "int8_linear_cpu", int8_linear_cpu) ||
        torch.library_impl(library, "attend_one_cpu", attend_one_cpu) ||
        torch.library_impl(library, "distillation_cpu", distillation_cpu) ||
        torch.library_impl(library, "plane_levels_cpu", plane_levels_cpu) ||
        torch.library_impl(library, "plane_gradients_cpu", plane_gradients_cpu) ||
        torch.library_impl(library, "latent_levels_cpu", latent_levels_cpu) ||
        torch.library_impl(library, "latent_gradients_cpu", latent_gradients_cpu) ||
        torch.library_impl(library, "block_before_cache", block_before_cache) ||
        torch.library_impl(library, "block_after_cache", block_after_cache))
        return "aoti_torch_library_impl";
    return NULL;
}
