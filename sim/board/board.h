// The C interface of the simulated board: a Verilated board with its SDRAM, behind a file descriptor
// that carries the bytes of its serial line. Python reaches it through ctypes (board.py); the
// structures below are mirrored there field by field.

#pragma once

#include <cstdint>

extern "C" {

typedef struct moeaccel_board moeaccel_board;

// Why moeaccel_board_serve came back.
enum moeaccel_board_reason : int32_t {
    MOEACCEL_BOARD_TIME = 0,       // the time is over
    MOEACCEL_BOARD_STOPPED = 1,    // the other descriptor became readable, or its other end closed
    MOEACCEL_BOARD_VIOLATION = 2,  // the controller broke a rule of the SDRAM
    MOEACCEL_BOARD_FAILED = 3,     // an assertion failed, or $stop or $fatal
    MOEACCEL_BOARD_LINE = 4,       // the line's descriptor gives errors
};

// What happens to each byte on its way, in 1/2^32; both directions alike.
typedef struct {
    uint64_t seed;
    uint32_t flip;    // one of its bits
    uint32_t lose;
    uint32_t repeat;
} moeaccel_board_noise;

typedef struct {
    uint64_t cycles;
    uint64_t bytes_received;  // by the board
    uint64_t bytes_sent;
    uint64_t flipped;
    uint64_t lost;
    uint64_t repeated;
    uint32_t violation;       // its number; 0: none
} moeaccel_board_state;

__attribute__((visibility("default"))) moeaccel_board* moeaccel_board_open(
    uint32_t cycles_per_bit, const moeaccel_board_noise* noise, char* message,
    uint64_t message_size);
__attribute__((visibility("default"))) void moeaccel_board_close(moeaccel_board* board);

// The SDRAM's bytes, in the order of their addresses; valid until the board is closed.
__attribute__((visibility("default"))) uint8_t* moeaccel_board_memory(moeaccel_board* board);

// Carry bytes between the line and `line`, for so many milliseconds at most. Time passes in the
// board while it has something to do; else the call sleeps.
__attribute__((visibility("default"))) int32_t moeaccel_board_serve(
    moeaccel_board* board, int32_t line, int32_t stop, uint32_t milliseconds);

__attribute__((visibility("default"))) void moeaccel_board_read_state(
    const moeaccel_board* board, moeaccel_board_state* state);

// What the model printed.
__attribute__((visibility("default"))) const char* moeaccel_board_log(const moeaccel_board* board);

}  // extern "C"
