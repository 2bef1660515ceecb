/* dbllm::attend_one_cpu(Tensor query, Tensor key, Tensor value, Tensor mask, float scale) -> Tensor
 */
#include "torch_attention.h"

#include <string.h>

#include "fdb.h"
#include "torch_check.h"

typedef struct {
    int64_t heads;
    const float* query; /* [batch][heads][dim], scaled */
    array key, value;   /* [batch][key heads][positions][dim] */
    array mask;         /* bool [batch or 1][1][1][positions], or [0][0] for none */
    float *scores, *out;
} call;

enum { GRAIN = 1 << 15 }; /* multiplications: less is not worth waking another thread */

static const char* head_of(const array* x, int64_t sequence, int64_t head) {
    return x->data + (sequence * x->strides[0] + head * x->strides[1]) * array_element_bytes(x);
}

static void attend(int64_t first, int64_t last, void* context) {
    const call* c = context;
    const array *key = &c->key, *value = &c->value, *mask = &c->mask;
    int64_t heads = key->sizes[1], positions = key->sizes[2], dim = key->sizes[3];
    int64_t shared = c->heads / heads;
    for (int64_t i = first; i < last; i++) {
        int64_t sequence = i / heads, head = i % heads, at = i * shared;
        attention_head h = {
            .bfloat16 = key->type == BFLOAT16,
            .queries = shared,
            .positions = positions,
            .dim = dim,
            .key = head_of(key, sequence, head),
            .value = head_of(value, sequence, head),
            .key_bytes = key->strides[2] * array_element_bytes(key),
            .value_bytes = value->strides[2] * array_element_bytes(value),
            .query = c->query + at * dim,
            .scores = c->scores + at * positions,
            .out = c->out + at * dim,
        };
        if (mask->sizes[1] > 0)
            h.mask = (const uint8_t*)mask->data + (mask->sizes[0] > 1 ? sequence : 0) * positions;
        fdb_chosen->attention(&h);
    }
}

enum { LARGEST_HEAD = 512, MOST_SHARED = 64 }; /* kernels/attention.py has them too */

static int is_cache(const array* x, const array* query) {
    return x->type == query->type && x->dim == 4 && x->sizes[0] == query->sizes[0] &&
           x->sizes[3] == query->sizes[3] && x->sizes[2] > 0 && x->sizes[1] > 0 &&
           x->strides[3] == 1;
}

int attention_fits(const stable_value* arguments, const array* query) {
    array key, value, mask;
    array_describe((tensor)arguments[1], &key);
    array_describe((tensor)arguments[2], &value);
    array_describe((tensor)arguments[3], &mask);
    if (!is_computed(query) || query->dim != 4 || query->sizes[2] != 1) return 0;
    if (query->sizes[0] < 1 || query->sizes[3] < 1 || query->sizes[3] > LARGEST_HEAD) return 0;
    if (!is_cache(&key, query) || !is_cache(&value, query)) return 0;
    int64_t heads = key.sizes[1], positions = key.sizes[2];
    if (value.sizes[1] != heads || value.sizes[2] != positions) return 0;
    if (query->sizes[1] % heads != 0 || query->sizes[1] / heads > MOST_SHARED) return 0;
    if (mask.dim == 2) return mask.sizes[0] == 0 && mask.sizes[1] == 0;
    int64_t masked = mask.dim == 4 && mask.sizes[0] == 1 ? 1 : query->sizes[0];
    return has_sizes(&mask, BOOLEAN, 4, (int64_t[]){masked, 1, 1, positions});
}

void attention_run(const stable_value* arguments, const array* query, float scale, float* scaled,
                   float* out) {
    call c = {.heads = query->sizes[1], .query = scaled, .out = out};
    array_describe((tensor)arguments[1], &c.key);
    array_describe((tensor)arguments[2], &c.value);
    array_describe((tensor)arguments[3], &c.mask);
    int64_t batch = query->sizes[0], rows = batch * c.heads, dim = query->sizes[3];
    int64_t key_heads = c.key.sizes[1], positions = c.key.sizes[2];
    for (int64_t i = 0; i < rows; i++) array_read(query, i, dim, scaled + i * dim);
    for (int64_t i = 0; i < rows * dim; i++) scaled[i] *= scale;
    c.scores = work_memory(WORK_ATTENTION, work_bytes(rows * positions * 4));
    int64_t work = c.heads / key_heads * positions * dim;
    torch.parallel_for(0, batch * key_heads, 1 + GRAIN / work, attend, &c);
}

void attend_one_cpu(stable_value* stack, uint64_t inputs, uint64_t outputs) {
    (void)inputs, (void)outputs;
    array query;
    double scale;
    char* data;
    memcpy(&scale, &stack[4], sizeof scale);
    array_describe((tensor)stack[0], &query);
    REQUIRE(attention_fits(stack, &query), 4,
            "attend_one takes one query a sequence, and keys, values and a mask that fit it");
    int64_t batch = query.sizes[0], heads = query.sizes[1], dim = query.sizes[3];
    int64_t numbers = batch * heads * dim;
    float* own = work_memory(WORK_INPUTS, work_bytes(2 * numbers * 4));
    attention_run(stack, &query, (float)scale, own, own + numbers);
    tensor result = array_new((int64_t[]){batch, 1, heads, dim}, 4, query.type, &data);
    array_write(own + numbers, numbers, 1, query.type, data, 0);
    for (int i = 0; i < 4; i++) torch.delete_tensor((tensor)stack[i]);
    stack[0] = (stable_value)result;
}
