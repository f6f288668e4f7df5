// The C interface of the co-simulation harness. Python reaches it through ctypes (cosim.py); the
// structures below are mirrored there field by field.
//
// One handle owns one Verilated model, its memories and its AXI4-Lite master. A handle may be used
// by one thread at a time; different handles are independent. Nothing here waits without a bound.
// The memories belong to the caller, who reads and writes them directly between calls.

#pragma once

#include <cstdint>

#define MOEACCEL_API_VERSION 2

#if defined(__GNUC__)
#define MOEACCEL_EXPORT __attribute__((visibility("default")))
#else
#define MOEACCEL_EXPORT
#endif

extern "C" {

typedef struct moeaccel_simulation moeaccel_simulation;

// Why a call came back.
enum moeaccel_reason : int32_t {
    MOEACCEL_CYCLES = 0,     // the cycles asked for have passed
    MOEACCEL_IRQ = 1,        // irq is high
    MOEACCEL_VIOLATION = 2,  // a protocol violation was recorded, and the handle is strict
    MOEACCEL_STOP = 3,       // an assertion failed, or $stop or $fatal
    MOEACCEL_FINISH = 4,     // $finish
    MOEACCEL_TIMEOUT = 5,    // a register access got no answer
    MOEACCEL_DONE = 6,       // a register access is complete
};

// Channels of random stalls, in the order of every `stall` array.
enum { MOEACCEL_AR, MOEACCEL_R, MOEACCEL_AW, MOEACCEL_W, MOEACCEL_B, MOEACCEL_CHANNELS };

// Timing of one memory. Every memory port has a memory of its own.
#define MOEACCEL_WRITTEN_BYTES 64

typedef struct {
    uint8_t* data;                  // the memory itself, which the caller keeps
    uint8_t* written;               // a byte for each MOEACCEL_WRITTEN_BYTES: not 0 once written.
                                    // Reads of others are violations; null: nobody asks
    uint64_t size;                  // bytes, a multiple of 4096; outside is SLVERR
    uint64_t seed;
    uint64_t bandwidth_numerator;   // bytes in a cycle, a fraction; 0: one beat in a cycle
    uint64_t bandwidth_denominator;
    uint32_t shared_bandwidth;      // 1: reads and writes share it; 0: each has it
    uint32_t never_refuse;          // 1: AW, W and AR are always ready
    uint32_t read_latency;          // cycles from AR accepted to the first R beat, at least 1
    uint32_t write_latency;         // cycles from the last of AW and W accepted to B, at least 1
    uint32_t read_latency_most;     // each burst's own, drawn up to here; less: always the same
    uint32_t write_latency_most;
    uint32_t last_beat_delay;       // of a read burst, behind the beat before or the latency
    uint32_t max_reads;             // bursts accepted and not finished
    uint32_t max_writes;
    uint32_t refresh_interval;      // 0: no refresh
    uint32_t refresh_cycles;        // no data and no responses for so many of every interval
    uint32_t turnaround_cycles;     // lost when shared bandwidth changes its direction
    uint32_t row_bytes;             // 0: no row model
    uint32_t banks;
    uint32_t row_miss_cycles;       // to open another row of a bank
    uint32_t stall[MOEACCEL_CHANNELS];  // chance of a stall in every cycle, in 1/65536
    uint32_t stall_length;          // a stall lasts 1 to so many cycles
    uint32_t reorder;               // bursts of different ids may overtake each other
    uint32_t interleave;            // and their beats may be mixed
    uint32_t response_timeout;      // cycles until a response not taken is a violation; 0: never
    uint32_t check_races;           // accesses that overlap an unfinished one are violations
} moeaccel_memory_config;

// How the AXI4-Lite master behaves; `stall` delays its valid and ready signals.
typedef struct {
    uint64_t seed;
    uint32_t stall[MOEACCEL_CHANNELS];
    uint32_t stall_length;
} moeaccel_register_config;

typedef struct {
    uint64_t bytes_read;             // whole beats
    uint64_t bytes_written;          // strobed bytes
    uint64_t read_bursts;
    uint64_t write_bursts;
    uint64_t read_beats;             // cycles with data moving on R
    uint64_t write_beats;            // and on W
    uint64_t read_wait_cycles;       // RVALID without RREADY
    uint64_t write_wait_cycles;      // WVALID without WREADY
    uint64_t read_busy_cycles;       // cycles with a read outstanding
    uint64_t first_read_cycle;       // of data; all ones: none yet
    uint64_t last_read_cycle;
    uint64_t first_write_cycle;
    uint64_t last_write_cycle;
    uint64_t most_reads;             // outstanding bursts, at most
    uint64_t most_writes;
} moeaccel_stats;

MOEACCEL_EXPORT uint32_t moeaccel_api_version(void);
MOEACCEL_EXPORT uint32_t moeaccel_port_count(void);
MOEACCEL_EXPORT uint32_t moeaccel_data_bytes(void);

// A new model in its power-on state; null, with the reason in `message`, when that fails.
// `memories` has moeaccel_port_count() entries.
MOEACCEL_EXPORT moeaccel_simulation* moeaccel_open(const moeaccel_memory_config* memories,
                                                   const moeaccel_register_config* registers,
                                                   uint32_t strict, char* message,
                                                   uint64_t message_size);
MOEACCEL_EXPORT void moeaccel_close(moeaccel_simulation* simulation);

// Hold reset for `cycles`; what memory holds and statistics stay. With `memory` the memory ports are
// reset, too, and forget the transactions in flight; else they go on, and answer them.
MOEACCEL_EXPORT int32_t moeaccel_reset(moeaccel_simulation* simulation, uint64_t cycles,
                                       uint32_t memory);

// Advance until irq is high (if asked for), something went wrong, or `cycles` have passed.
MOEACCEL_EXPORT int32_t moeaccel_run(moeaccel_simulation* simulation, uint64_t cycles,
                                     uint32_t until_irq);
MOEACCEL_EXPORT uint64_t moeaccel_cycle(const moeaccel_simulation* simulation);
MOEACCEL_EXPORT uint32_t moeaccel_irq(const moeaccel_simulation* simulation);

// AXI4-Lite transactions; `response` is the bus's (0: OKAY).
MOEACCEL_EXPORT int32_t moeaccel_register_read(moeaccel_simulation* simulation, uint32_t address,
                                               uint64_t timeout, uint32_t* value,
                                               uint32_t* response);
MOEACCEL_EXPORT int32_t moeaccel_register_write(moeaccel_simulation* simulation, uint32_t address,
                                                uint32_t value, uint32_t strobe, uint64_t timeout,
                                                uint32_t* response);

// Answer `response` (2 SLVERR, 3 DECERR) to beats in [first, last]; such writes do nothing.
MOEACCEL_EXPORT void moeaccel_inject_error(moeaccel_simulation* simulation, uint32_t port,
                                           uint64_t first, uint64_t last, uint32_t response,
                                           uint32_t reads, uint32_t writes);
MOEACCEL_EXPORT void moeaccel_clear_errors(moeaccel_simulation* simulation, uint32_t port);

MOEACCEL_EXPORT void moeaccel_read_stats(const moeaccel_simulation* simulation, uint32_t port,
                                         moeaccel_stats* stats);
MOEACCEL_EXPORT void moeaccel_clear_stats(moeaccel_simulation* simulation, uint32_t port);

// Violations: all are counted, the first few hundred are kept. The text stays valid until cleared.
MOEACCEL_EXPORT uint64_t moeaccel_violation_count(const moeaccel_simulation* simulation);
MOEACCEL_EXPORT const char* moeaccel_violation(const moeaccel_simulation* simulation,
                                               uint64_t index, uint64_t* cycle,
                                               const char** channel);
MOEACCEL_EXPORT void moeaccel_clear_violations(moeaccel_simulation* simulation);

// What the model printed ($display, failed assertions, Verilator itself), the newest part of it.
MOEACCEL_EXPORT const char* moeaccel_log(const moeaccel_simulation* simulation);

// Waves, in models built for it. 0: fine; 1: not built for waves; 2: cannot write the file.
MOEACCEL_EXPORT int32_t moeaccel_waves_start(moeaccel_simulation* simulation, const char* path);
MOEACCEL_EXPORT void moeaccel_waves_stop(moeaccel_simulation* simulation);

}  // extern "C"
