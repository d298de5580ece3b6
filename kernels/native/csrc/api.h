// The types that every file of the native backend shares. Python sees only the `iso_` functions of bind.cpp.
//
// "Word": 32 bits of a row, the unit that every product works in: two neighbouring bfloat16 (the even one in the low
// half) or one float32. "Tile": 32 outputs of a weight, stored [word of K][output], which is the order in which the
// kernels stream it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "memory.h"
#include "pool.h"

namespace iso {

constexpr int kTile = 32;         // outputs per tile
constexpr int kScaleBlock = 128;  // FP8: inputs per block scale
constexpr int kScaleWords = kScaleBlock / 2;
constexpr int kLeastGroupWords = 16;  // of integers: words that share a scale, at the least
constexpr int kRoundGroup = 32;       // inputs that share a scale where weights are rounded here
constexpr int kSplit =
    256;  // attention: positions per softmax split, counted from position 0; part of the result's definition

// The one list of the kinds of tiles: X(how a packed weight is kept, whose multiplication takes it). Each defines its
// TileKind (tile_kind.h) in a source file, and `<multiplication>_multiply` in a header of kernels.inc. The order is the
// numbers that Python gives (kernels/native/packed.py).
#define ISO_TILE_KINDS(X) \
  X(bf16, word) X(fp8, fp8) X(f32, word) X(coded, coded) X(int4, int4) X(int8, int8) X(int6, int6)
enum class Kind : int {
#define ISO_KIND(name, multiplication) name,
  ISO_TILE_KINDS(ISO_KIND)
#undef ISO_KIND
};
#define ISO_KIND(name, multiplication) +1
constexpr int kKinds = 0 ISO_TILE_KINDS(ISO_KIND);
#undef ISO_KIND
// Whether a weight is integers, with a scale for each group of inputs (grouped.cpp).
constexpr bool is_grouped(Kind kind) { return kind == Kind::int4 || kind == Kind::int8 || kind == Kind::int6; }
enum class Dtype : int { bf16, f16, f32, e4m3, u8, i8 };  // what the caller's tensors hold

// One tensor of a stored weight, as rows. Python fills it: see Operand in kernels/native/operand.py.
struct Operand {
  const void* data;
  int64_t row_stride;  // in elements
  Dtype dtype;
};

// A weight that the codes of its tile can't say. `place`: in the decoded tile, in 16-bit values. A tile's list ends
// with kNoException.
struct CodedException {
  uint32_t place;
  uint32_t value;
};
constexpr uint32_t kNoException = 0xffffffff;
constexpr int kCodes = 16;
constexpr int64_t kCodedPair = 192;  // bytes of two words of a coded tile

// How integers are scaled: a scale for each group of inputs of an output. Python fills it: see Grouping in
// kernels/native/weights.py.
struct Grouping {
  int64_t inputs;       // of a group, a multiple of 8
  int64_t scale_bytes;  // 1: see narrow_scale; 2: scales are bfloat16 numbers; 4
  int64_t zeros;        // whether there are zero points
  int64_t exponent;     // of scales of one byte: the least, biased
};

// A packed weight of one or more parts (projections, heads) that share K. Each part starts on a tile of its own; the
// last may be ragged.
struct Linear {
  Kind kind;
  int64_t outputs, inputs, words;  // words: of one row of K
  int parts;
  int64_t tiles, scale_blocks;
  size_t tile_bytes;
  uint8_t* data;  // [tile] in the order of its kind, and for coded tiles all that follows from `code_tables` on
  size_t data_bytes;
  float* scales;                    // fp8: [tile][scale block]
  Grouping grouping;                // of integers: a tile is its groups' blocks, one after the other (grouped.cpp)
  int64_t code_bytes, block_bytes;  // of a block: its codes, and all of it
  float* bias;                      // [tile][32] or null
  int64_t* part_tile;               // [parts + 1] first tile of each part
  int64_t* tile_column;             // [tiles] output column of the tile's first output
  int32_t* tile_width;              // [tiles] outputs in use, 1 .. 32
  uint8_t* code_tables;             // coded: [tile][2][16] low and high bytes of a code's exponent as bfloat16
  int64_t* exception_begin;         // coded: [tiles + 1]
  CodedException* exceptions;

  const uint8_t* tile(int64_t t) const { return data + static_cast<size_t>(t) * tile_bytes; }
};

// Where a packed weight lies, and all that its shape does not say of how. Python reads it: see LinearForm in
// kernels/native/packed.py.
struct LinearForm {
  int kind, biased;
  Grouping grouping;
  void* data;
  int64_t data_bytes;
  void* scales;
  int64_t scales_bytes;
};

// A scale of one byte: its sign, how much its exponent is above the least of the weight, in three bits, and four bits
// after the point. Of `bits`, which float32 has no others of.
inline uint8_t narrow_scale(uint32_t bits, int64_t exponent) {
  return static_cast<uint8_t>(bits >> 31 << 7 | ((bits & 0x7fffffff) - (static_cast<uint32_t>(exponent) << 23)) >> 19);
}

// Where output o (0 .. 31) stands among the 32 16-bit pairs of a word of a tile of bytes: interleaving the
// low and high result bytes within 128-bit lanes then gives outputs 0 .. 15 and 16 .. 31 in order.
inline int byte_place(int o) { return (o % 16) / 4 * 8 + (o >= 16 ? 4 : 0) + o % 4; }

// int4: where among 64 bytes, which are two words, the first byte of output o stands: [element][word], and output o +
// 16 in the upper halves of the same.
inline int int4_place(int o) { return o % 16 * 4; }

struct Bank {
  int64_t slots, hidden, inner;
  const Linear** gate_up;  // null: empty
  const Linear** down;
};

struct Span {
  const uint8_t* at;
  int64_t bytes;
};

// What the threads of a call will most likely read after it: they fetch the beginning of that from memory while they
// finish. Null: nothing is known.
struct Upcoming {
  const Linear* weight = nullptr;
  bool by_part = false;         // whether by `head_linear`
  const Span* spans = nullptr;  // what is no weight; its threads share it
  int64_t span_count = 0;
};

struct ExpertsCall {
  const void* x;
  int64_t x_stride, x_rows;
  const Linear* const* gate_up;  // [active]
  const Linear* const* down;
  int64_t active, pairs, inner, hidden;
  const int32_t* rows;     // [pairs] or null: pair p reads row p
  const int64_t* offsets;  // [active + 1]
  void* out;               // [pairs, hidden]
  Upcoming then = {};
};

// A layer's paged cache. The row of a position is its latent and its rotary key in the activations' type; in `fp8` the
// rotary key, a scale, and e4m3 codes of the latent (kernels/cache_rows.py).
struct Cache {
  uint8_t* data;
  int64_t block_size, latent, rotary;
  bool fp8;

  int64_t row_bytes(int64_t element) const {
    return element * (fp8 ? rotary + 1 + (latent + element - 1) / element : latent + rotary);
  }
};

struct PrefillCall {
  const void* q;
  int64_t q_row, q_head;  // strides in elements, as everywhere
  Cache cache;
  const int32_t* table;
  int64_t start, rows, heads, nope, value;
  const Linear* kv_b;
  float scale;
  void* out;  // [rows, heads * value]
};

struct DecodeCall {
  const void *q_latent, *q_rope;
  int64_t latent_row, latent_head, rope_row, rope_head;
  Cache cache;
  const int32_t* tables;
  int64_t table_stride;
  const int32_t *sequence, *lengths;
  int64_t rows, heads;
  float scale;
  void* out;  // [rows, heads, latent]
};

// One layer's attention and the norms around it; null where kernels/ops.py's AttentionWeights has None. Python fills
// it: see _AttentionWeights.
struct AttentionWeights {
  const Linear *input, *q_b, *kv_b, *k_absorb, *v_absorb, *o;
  const void *norm, *q_norm, *kv_norm, *post_norm;
  int64_t heads, nope, rotary, latent, value;
  float eps, latent_eps, scale;
};

struct PrefillRows {
  int64_t first, count, start;
  const int32_t* table;
  int64_t table_width;
};

// Where a step's rows stand in their sequences. Python fills it: see _AttentionRows.
struct AttentionRows {
  int64_t rows, decodes;
  const float *cos, *sin;
  const int64_t* slots;
  const int32_t* tables;
  int64_t sequences, table_width;
  const int32_t *sequence, *lengths;
  int64_t prefills;
  const PrefillRows* prefill;
};

// The gate of a MoE layer. Python fills it: see RouterFields in kernels/native/router.py.
struct Router {
  int64_t hidden, experts;
  const void* weight;  // [experts, hidden], float32, or where `narrow` bfloat16
  const float* bias;
  int n_group, topk_group, top_k, normalise, narrow;
  float scaling;
};

struct RouteCall : Router {
  const void* x;
  int64_t x_stride, rows;
  int32_t* ids;
  float* weights;
};

// A MoE layer with every expert in one bank. Python fills it: see _MoeLayer in kernels/native/moe.py.
struct MoeLayer {
  Router router;
  const Bank* bank;
  const int32_t* slot_of;        // [experts]: where each is in the bank
  const Linear *gate_up, *down;  // the shared experts, or null
};

struct MoeCall {
  const void *x, *residual;  // [rows, hidden]
  int64_t rows;
  void* out;  // [rows, hidden]
  Upcoming then = {};
};

// A decoder layer whose routed experts, where it has any, are in one bank. Python fills it: see _DecoderLayer in
// kernels/native/decoder.py.
struct DecoderLayer {
  const AttentionWeights* attention;
  const MoeLayer* moe;           // null: the layer is dense
  const Linear *gate_up, *down;  // of the dense MLP
  void* cache;
};

// Where the rows of a call of `decoder` are, [rows, hidden] each: what goes in is in x; what comes out is there after
// an even number of layers, else in `other`. Python fills it too.
struct DecoderRows {
  void *x, *h, *other;
  int64_t blocks, block_size, fp8;  // of every layer's cache
};

// A layer that guesses tokens, but for its decoder layer. Python fills it: see _DraftLayer in kernels/native/draft.py.
struct DraftLayer {
  const void *main_norm, *embedding, *enorm, *hnorm, *norm;
  const Linear *eh_proj, *head;
  const float *cos, *sin;  // [positions, rotary / 2]
  int64_t vocabulary, positions, rotary;
  float eps;
};

// What is asked for one stream; Kernels.draft has its meaning. `blocks`: how many its table has from `skipped` on.
struct DraftStream {
  int64_t start, rows, expanded, skipped, blocks, guesses, top_k, seed, index;
  double temperature, top_p;
};

struct HiddenRows {
  const void* data;
  int64_t rows;
};

struct DraftCall {
  const DraftStream* streams;  // those that are expanded come last
  int64_t count;
  const int32_t* tables;     // of each stream
  const int64_t* tokens;     // of each row
  const HiddenRows* hidden;  // of all rows, in so many pieces
  int64_t pieces;
  int64_t most;                     // guesses of a stream
  int64_t blocks, block_size, fp8;  // of the layer's cache
  int64_t* out;                     // [count, most]
};

struct SampleCall {
  const float* logits;
  int64_t stride, rows, vocab;
  const double *temperature, *top_p;
  const int64_t *top_k, *seed, *index;
  int64_t* out;
};

// Building blocks of sampling that are worth vectorising; the choice of candidates is plain C++ (sample.cpp).
struct SampleOps {
  // The logit of a token whose bit is not set becomes -inf.
  void (*forbid)(float* logits, int64_t count, const uint32_t* allowed);
  int64_t (*argmax)(const float* values, int64_t count);
  // values = logits / temperature; returns the largest.
  float (*scale)(const float* logits, float temperature, float* values, int64_t count);
  // weights = exp(double(values) - largest)
  void (*softmax_weights)(const float* values, double largest, double* weights, int64_t count);
  // Among ids [first, first + count) with (value, -id) >= (least, -least_id): the largest value + noise, against what
  // *best already holds.
  void (*gumbel)(const float* values, int64_t first, int64_t count, uint64_t key, float least, int64_t least_id,
                 double* best, int64_t* best_id);
};

// A stored weight to be rounded to integers: its numbers in bf16, f32, or e4m3, and of the latter the scales of its
// blocks after them. Groups without an end of their own count as filled up with zeros.
struct RoundCall {
  const Operand* operands;
  int64_t rows, inputs;
  uint8_t* codes;  // int4: nibbles [rows, ⌈inputs / 2⌉]; int8: [rows, inputs]
  float* scales;   // [rows, groups]
};

// One instruction set's kernels. `f32` selects float32 activations, otherwise bfloat16.
struct Ops {
  const char* name;
  bool reads_coded;  // whether it multiplies by Kind::coded
  void (*linear)(Pool&, bool f32, const Linear&, const void* x, int64_t x_stride, int64_t rows, void* out, bool out_f32,
                 Upcoming then);
  void (*head_linear)(Pool&, bool f32, const Linear&, const void* x, int64_t x_row, int64_t x_head, int64_t rows,
                      void* out, Upcoming then);
  void (*experts)(Pool&, bool f32, const ExpertsCall&);
  void (*mla_prefill)(Pool&, bool f32, const PrefillCall&);
  void (*mla_decode)(Pool&, bool f32, const DecodeCall&);
  void (*route)(Pool&, bool f32, const RouteCall&);
  // residual: null, or [rows, width], to which x is added first (and stored) before the sum is normalised
  void (*rms_norm)(Pool&, bool f32, const void* x, int64_t x_stride, int64_t rows, int64_t width, const void* weight,
                   float eps, void* residual, void* out);
  void (*rope)(Pool&, bool f32, const void* x, int64_t x_row, int64_t x_head, int64_t rows, int64_t heads,
               int64_t width, const float* cos, const float* sin, void* out, int64_t out_row,
               int64_t out_head);  // `out` may be x
  void (*write_fp8)(Pool&, bool f32, const void* latent, int64_t latent_row, const void* rope, int64_t rope_row,
                    const Cache&, const int64_t* slots, int64_t rows);
  // outputs: [rows, k], where each pair's output is. own, residual: null, or [rows, width], added in this order to the
  // rounded sum, which is left out where k is 0
  void (*combine)(Pool&, bool f32, const void* const* outputs, int64_t rows, int64_t width, int64_t k,
                  const float* weights, const void* own, const void* residual, void* out);
  SampleOps sample;
  bool (*round_int4)(Pool&, const RoundCall&);  // whether all numbers are finite: else what was written means nothing
  bool (*round_int8)(Pool&, const RoundCall&);
  bool (*round_int6)(Pool&, const RoundCall&);  // a byte each, as int8
};

const Ops* amx_ops();  // null where the build or the machine lacks it
const Ops* avx512_ops();
const Ops* avx2_ops();
const Ops* generic_ops();

// With room for so many bytes of tiles, or for as many as its kind takes where that is 0. Null: no memory.
Linear* create_linear(int kind, int64_t inputs, int parts, const int64_t* part_outputs, const float* bias,
                      const Grouping*, size_t data_bytes);
void destroy(Linear*);
void pack_part(Pool&, Linear&, int part, const Operand* operands);
void code(Pool&, const Ops&, Linear&);  // bf16 → coded, where that is smaller by an eighth
void sample(Pool&, const Ops&, const SampleCall&);
void write_cache(Pool&, const Ops&, bool f32, const void* latent, int64_t latent_row, const void* rope,
                 int64_t rope_row, const Cache&, const int64_t* slots, int64_t rows);
// False: an expert that rows go to is not in the bank.
bool moe(Pool&, const Ops&, bool f32, const MoeLayer&, const MoeCall&);
void attention(Pool&, const Ops&, bool f32, const AttentionWeights&, const AttentionRows&, void* x, const Cache&,
               void* out, const Upcoming& then = {});
// What comes after a layer's attention. False as `moe`.
bool feed_forward(Pool&, const Ops&, bool f32, const DecoderLayer&, const MoeCall&);
// Layer after layer. False as `moe`.
bool decoder(Pool&, const Ops&, bool f32, const DecoderLayer*, int64_t count, const AttentionRows&, const DecoderRows&);
// Whether all that it names is there: to be asked before `draft`.
bool draft_fits(const DraftLayer&, const DraftCall&);
// False as `moe`.
bool draft(Pool&, const Ops&, bool f32, const DraftLayer&, const DecoderLayer&, const DraftCall&);

}  // namespace iso
