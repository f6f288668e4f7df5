// Runs a Verilated board and carries the bytes of its serial line, see board.h.

#include "board.h"

#include <poll.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <deque>
#include <memory>
#include <stdexcept>
#include <string>

#include "Vtop.h"
#include "support.h"
#include "verilated.h"
#include "verilated_syms.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "words of the SDRAM are read as bytes");

namespace {

constexpr uint64_t kChunk = 2048;        // cycles between looks at the descriptors
constexpr uint64_t kAwake = 1 << 18;     // cycles that the board goes on after its last activity
constexpr uint64_t kResetCycles = 16;
constexpr size_t kInput = 64, kOutput = 1 << 16;  // bytes on their way, at most

thread_local moeaccel_board* current = nullptr;
thread_local std::string orphaned;  // printed while no board exists yet

// What the line does to bytes.
class Noise {
public:
    Noise(const moeaccel_board_noise& noise, moeaccel_board_state& state, uint64_t stream)
        : noise_(noise), state_(state), random_(noise.seed * 2 + stream) {}

    void carry(uint8_t byte, std::deque<uint8_t>& to) {
        if (hits(noise_.flip)) {
            byte ^= uint8_t(1u << random_.below(8));
            ++state_.flipped;
        }
        if (hits(noise_.lose)) {
            ++state_.lost;
            return;
        }
        to.push_back(byte);
        if (hits(noise_.repeat)) {
            to.push_back(byte);
            ++state_.repeated;
        }
    }

private:
    bool hits(uint32_t threshold) { return threshold != 0 && (random_.next() >> 32) < threshold; }

    const moeaccel_board_noise noise_;
    moeaccel_board_state& state_;
    moeaccel::Random random_;
};

}  // namespace

struct moeaccel_board {
    moeaccel_board(uint32_t cycles, const moeaccel_board_noise& noise)
        : cycles_per_bit(cycles), in(noise, state, 0), out(noise, state, 1) {
        top = std::make_unique<Vtop>(&context, "top");
        top->clk = 0;
        top->rst = 1;
        top->i_rx = 1;
        top->eval();
        for (uint64_t i = 0; i < kResetCycles; ++i) step();
        top->rst = 0;
        stopped = false;  // assertions hold from reset on
    }

    void step() {
        top->clk = 1;
        top->eval();
        ++state.cycles;
        context.time(state.cycles);
        drive();
        sample();
        top->clk = 0;
        top->eval();
    }

    // Put the next bit on the line to the board.
    void drive() {
        if (drive_left != 0) {
            --drive_left;
            return;
        }
        if (drive_bits == 0 && !input.empty()) {
            drive_word = 0x200 | uint32_t(input.front()) << 1;  // stop, data, start
            drive_bits = 10;
            input.pop_front();
            ++state.bytes_received;
        }
        if (drive_bits == 0) return;
        top->i_rx = drive_word & 1;
        drive_word >>= 1;
        --drive_bits;
        drive_left = cycles_per_bit - 1;
        quiet = 0;
    }

    // Look at the line from the board, in the middle of each bit.
    void sample() {
        if (sample_bits == 0) {
            if (!top->o_tx) {
                sample_bits = 10;
                sample_left = cycles_per_bit / 2;
                sample_word = 0;
            }
        } else if (--sample_left == 0) {
            sample_left = cycles_per_bit;
            sample_word = sample_word >> 1 | uint32_t(top->o_tx) << 9;
            if (--sample_bits == 0) {
                ++state.bytes_sent;
                if (output.size() < kOutput) out.carry(uint8_t(sample_word >> 1), output);
            }
        }
        if (sample_bits != 0 || top->o_busy) quiet = 0;
    }

    int32_t trouble() {
        state.violation = top->o_violation;
        if (stopped) return MOEACCEL_BOARD_FAILED;
        if (state.violation != 0) return MOEACCEL_BOARD_VIOLATION;
        return MOEACCEL_BOARD_TIME;
    }

    // Move bytes between the descriptor and the queues without waiting; false when it gives errors.
    bool pump(int line) {
        uint8_t buffer[kInput];
        while (input.size() < kInput) {
            const ssize_t count = read(line, buffer, sizeof buffer);
            if (count < 0 && errno == EINTR) continue;
            if (count < 0 && errno != EAGAIN) return false;
            if (count <= 0) break;
            for (ssize_t i = 0; i < count; ++i) in.carry(buffer[i], input);
        }
        while (!output.empty()) {
            size_t size = 0;
            for (; size < sizeof buffer && size < output.size(); ++size) buffer[size] = output[size];
            const ssize_t count = write(line, buffer, size);
            if (count < 0 && errno == EINTR) continue;
            if (count < 0 && errno != EAGAIN) return false;
            if (count <= 0) break;
            output.erase(output.begin(), output.begin() + count);
        }
        return true;
    }

    int32_t serve(int line, int stop, uint32_t milliseconds) {
        using Clock = std::chrono::steady_clock;
        const auto end = Clock::now() + std::chrono::milliseconds(milliseconds);
        while (true) {
            if (const int32_t reason = trouble()) return reason;
            if (!pump(line)) return MOEACCEL_BOARD_LINE;
            const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(
                end - Clock::now()).count();
            if (left <= 0) return MOEACCEL_BOARD_TIME;
            const bool awake = quiet < kAwake || !input.empty();
            pollfd waits[] = {
                {stop, POLLIN, 0},
                {line, short(POLLIN | (output.empty() ? 0 : POLLOUT)), 0},
            };
            if (poll(waits, awake ? 1 : 2, awake ? 0 : int(left)) > 0 && waits[0].revents != 0) {
                return MOEACCEL_BOARD_STOPPED;
            }
            if (!awake) continue;
            quiet += kChunk;
            for (uint64_t i = 0; i < kChunk; ++i) step();
        }
    }

    const uint32_t cycles_per_bit;
    VerilatedContext context;
    std::unique_ptr<Vtop> top;
    moeaccel_board_state state = {};
    Noise in, out;
    std::deque<uint8_t> input, output;
    uint32_t drive_word = 0, drive_bits = 0, drive_left = 0;
    uint32_t sample_word = 0, sample_bits = 0, sample_left = 0;
    uint64_t quiet = 0;  // cycles since anything happened, to within a chunk
    bool stopped = false;
    std::string log;
};

namespace {

void print(const std::string& text) { (current ? current->log : orphaned) += text; }

struct Enter {
    explicit Enter(moeaccel_board* board) { current = board; }
    ~Enter() { current = nullptr; }
};

}  // namespace

// -- what the model's run time calls ---------------------------------------------------------------

int moeaccel_model_printf(const char* format, ...) {
    char text[4096];
    va_list arguments;
    va_start(arguments, format);
    const int length = std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    print(text);
    return length;
}

void vl_finish(const char*, int, const char*) VL_MT_UNSAFE {
    if (current) current->stopped = true;
}

void vl_stop(const char* filename, int line, const char*) VL_MT_UNSAFE {
    print(std::string(filename) + ":" + std::to_string(line) + ": stopped\n");
    if (current) current->stopped = true;
}

void vl_fatal(const char* filename, int line, const char*, const char* message) VL_MT_UNSAFE {
    throw std::runtime_error(std::string(filename) + ":" + std::to_string(line) + ": " + message);
}

// -- the C interface -------------------------------------------------------------------------------

moeaccel_board* moeaccel_board_open(uint32_t cycles_per_bit, const moeaccel_board_noise* noise,
                                    char* message, uint64_t message_size) {
    try {
        orphaned.clear();
        return new moeaccel_board(cycles_per_bit, *noise);
    } catch (const std::exception& error) {
        std::snprintf(message, message_size, "%s%s", orphaned.c_str(), error.what());
        return nullptr;
    }
}

void moeaccel_board_close(moeaccel_board* board) { delete board; }

uint8_t* moeaccel_board_memory(moeaccel_board* board) {
    const VerilatedScope* scope = board->context.scopeFind("top.top.chip.memory");
    const VerilatedVar* array = scope ? scope->varFind("mem") : nullptr;
    return array ? static_cast<uint8_t*>(array->datap()) : nullptr;
}

int32_t moeaccel_board_serve(moeaccel_board* board, int32_t line, int32_t stop,
                             uint32_t milliseconds) {
    Enter enter(board);
    try {
        return board->serve(line, stop, milliseconds);
    } catch (const std::exception& error) {
        print(std::string(error.what()) + "\n");
        board->stopped = true;
        return MOEACCEL_BOARD_FAILED;
    }
}

void moeaccel_board_read_state(const moeaccel_board* board, moeaccel_board_state* state) {
    *state = board->state;
}

const char* moeaccel_board_log(const moeaccel_board* board) { return board->log.c_str(); }
