/* Sums that take turns.
 *
 * A sum that has just been multiplied cannot be stored before its 52 cycles are over, and its 16 waiting rows fill the
 * scheduler, so that nothing behind them starts: four stores at a tile's end cost 60 cycles, as much as four products.
 * Five registers of sums take turns instead: a tile starts on the one that the last tile left, and stores each of the
 * last tile's sums just before it needs the register, when that sum has long been there (16 products and 4 stores: 323
 * -> 266 cycles, 256 of them the products'). Its rows become results between the products that follow.
 */

/* A sum's product with the left tile, which is in 5. */
#define MORE(sum, right) _tile_dpbf16ps(sum, 5, right);
/* Its first one, and the last tile's sum of the register that is needed next, to `sums` and so many floats on. */
#define START(sum, right, last, place) \
    _tile_zero(sum);                   \
    _tile_dpbf16ps(sum, 5, right);     \
    _tile_stored(last, sums + (place), sums_bytes);

/* `turn(name, ...)` for every turn: the registers of the tile's four sums, then those of the last tile's. */
#define EVERY_TURN(turn, name) \
    turn(name##0, 0, 1, 2, 3, 4) turn(name##1, 4, 0, 1, 2, 3) turn(name##2, 3, 4, 0, 1, 2) \
    turn(name##3, 2, 3, 4, 0, 1) turn(name##4, 1, 2, 3, 4, 0)
#define TURNS_OF(name) {name##0, name##1, name##2, name##3, name##4}

static int next_turn(int turn) { return turn == 4 ? 0 : turn + 1; }
