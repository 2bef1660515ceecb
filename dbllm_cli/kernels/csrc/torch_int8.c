/* dbllm::int8_linear_cpu(Tensor x, Tensor weight) -> Tensor */
#include "fdb.h"
#include "torch_check.h"

enum { MAX_COLUMNS = 32, GRAIN_BYTES = 1 << 17 };

typedef struct {
    const uint8_t* weight;
    int64_t in, rows, columns;
    int16_t* q;
    float *x, *steps, *y;
} call;

static void make_product(int64_t first, int64_t last, void* context) {
    const call* c = context;
    int8_product(fdb_chosen->int8, c->weight, c->q, c->steps, c->in, c->columns, c->rows, first,
                 last, c->y);
}

static void multiply(call* c, const array* x, int64_t first_row, char* out) {
    int64_t stretches = int8_stretches(c->in);
    size_t q = work_bytes(c->in * c->columns * 2), row = work_bytes(c->in * 4);
    size_t steps = work_bytes(stretches * c->columns * 4), y = work_bytes(c->rows * c->columns * 4);
    char* memory = work_memory(WORK_INPUTS, q + row + steps + y);
    float lowered[MAX_COLUMNS];
    c->q = (int16_t*)memory;
    c->x = (float*)(memory + q);
    c->steps = (float*)(memory + q + row);
    c->y = (float*)(memory + q + row + steps);
    for (int64_t column = 0; column < c->columns; column++) {
        array_read(x, first_row + column, c->in, c->x);
        lowered[column] = array_lift(c->x, c->in);
        int8_quantize(c->x, c->in, c->q + column * c->in, c->steps + column * stretches);
    }
    torch.parallel_for(0, c->rows, 1 + GRAIN_BYTES / (c->in * c->columns), make_product, c);
    for (int64_t column = 0; column < c->columns; column++)
        array_write(c->y + column * c->rows, c->rows, lowered[column], x->type, out,
                    (first_row + column) * c->rows);
}

void int8_linear_cpu(stable_value* stack, uint64_t inputs, uint64_t outputs) {
    (void)inputs, (void)outputs;
    tensor x = (tensor)stack[0], weight = (tensor)stack[1];
    array input, rows_of;
    array_describe(x, &input);
    array_describe(weight, &rows_of);
    REQUIRE(is_floating(&input) && input.dim > 0 && input.sizes[input.dim - 1] > 0, 2,
            "int8_linear takes an input in float32, bfloat16 or float16");
    REQUIRE(rows_of.dim == 2 &&
                has_sizes(&rows_of, UINT8, 2,
                          (int64_t[]){rows_of.sizes[0], input.sizes[input.dim - 1] + 2}),
            2, "int8_linear takes rows of 8-bit weights, each with its scale");
    call c = {.weight = (const uint8_t*)rows_of.data};
    c.in = input.sizes[input.dim - 1], c.rows = rows_of.sizes[0];
    int64_t rows;
    char* data;
    tensor result = array_like(&input, c.rows, &rows, &data);
    for (int64_t row = 0; row < rows; row += MAX_COLUMNS) {
        c.columns = rows - row < MAX_COLUMNS ? rows - row : MAX_COLUMNS;
        multiply(&c, &input, row, data);
    }
    torch.delete_tensor(x);
    torch.delete_tensor(weight);
    stack[0] = (stable_value)result;
}
