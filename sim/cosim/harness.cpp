// The co-simulation harness: joins a Verilated model to its memories and to the register master,
// and runs the clock. One source for every data width and number of memory ports; the build defines
//
//   MOEACCEL_MEMORY_PORTS(X)   X(axi_mem) for each memory port, in Verilator's spelling
//   MOEACCEL_THREADS           threads of the model
//   MOEACCEL_WAVES             1 when the model can write FST files
//
// in ports.h, and the model's class is Vtop.

#include <cstdarg>
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "Vtop.h"
#include "harness.h"
#include "memory_port.h"
#include "ports.h"
#include "register_port.h"
#include "verilated.h"
#if MOEACCEL_WAVES
#include "verilated_fst_c.h"
#endif

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "pins are copied as little-endian bytes");

namespace moeaccel {

// The pins of a bus by their short names. Verilator spells a double underscore ___05F.
#define PIN(port, pin) \
    auto& pin() const { return top->port##___05F##pin; }

#define MEMORY_PINS(port)                                                                         \
    struct MemoryPins_##port {                                                                    \
        Vtop* top;                                                                                \
        static const char* name() { return #port; }                                               \
        PIN(port, awid) PIN(port, awaddr) PIN(port, awlen) PIN(port, awsize) PIN(port, awburst)   \
        PIN(port, awvalid) PIN(port, awready) PIN(port, wdata) PIN(port, wstrb) PIN(port, wlast)  \
        PIN(port, wvalid) PIN(port, wready) PIN(port, bid) PIN(port, bresp) PIN(port, bvalid)     \
        PIN(port, bready) PIN(port, arid) PIN(port, araddr) PIN(port, arlen) PIN(port, arsize)    \
        PIN(port, arburst) PIN(port, arvalid) PIN(port, arready) PIN(port, rid) PIN(port, rdata)  \
        PIN(port, rresp) PIN(port, rlast) PIN(port, rvalid) PIN(port, rready)                     \
    };
MOEACCEL_MEMORY_PORTS(MEMORY_PINS)

struct RegisterPins {
    Vtop* top;
    PIN(axil, awaddr) PIN(axil, awvalid) PIN(axil, awready) PIN(axil, wdata) PIN(axil, wstrb)
    PIN(axil, wvalid) PIN(axil, wready) PIN(axil, bresp) PIN(axil, bvalid) PIN(axil, bready)
    PIN(axil, araddr) PIN(axil, arvalid) PIN(axil, arready) PIN(axil, rdata) PIN(axil, rresp)
    PIN(axil, rvalid) PIN(axil, rready)
};

// Models need not have the input that says that memory is reset, too.
template <class Top>
auto set_memory_reset(Top& top, bool value, int) -> decltype(top.mem_rst, void()) {
    top.mem_rst = value;
}
template <class Top>
void set_memory_reset(Top&, bool, long) {}

// Every memory port is a member, so that the compiler sees through all of them.
struct Memories {
#define MEMBER(port) MemoryPort<MemoryPins_##port> port;
    MOEACCEL_MEMORY_PORTS(MEMBER)
#undef MEMBER

    Memories(Vtop* top, const moeaccel_memory_config* config, Violations& violations)
        : Memories(top, violations, config) {}

    template <class Call>
    void each(Call call) {
#define EACH(port) call(port);
        MOEACCEL_MEMORY_PORTS(EACH)
#undef EACH
    }

    template <class Call>
    void one(uint32_t index, Call call) {
        uint32_t i = 0;
        each([&](auto& port) {
            if (i++ == index) call(port);
        });
    }

private:
#define CONSTRUCT(port) port(MemoryPins_##port{top}, *config++, violations),
    Memories(Vtop* top, Violations& violations, const moeaccel_memory_config* config)
        : MOEACCEL_MEMORY_PORTS(CONSTRUCT) unused_(0) {}
#undef CONSTRUCT
    int unused_;
};

#define COUNT(port) +1
constexpr uint32_t kPorts = 0 MOEACCEL_MEMORY_PORTS(COUNT);
#undef COUNT

}  // namespace moeaccel

using namespace moeaccel;

struct moeaccel_simulation {
    moeaccel_simulation(const moeaccel_memory_config* memory_configs,
                        const moeaccel_register_config& register_config, bool be_strict)
        : strict(be_strict) {
        context.threads(MOEACCEL_THREADS);
        context.traceEverOn(MOEACCEL_WAVES);
        top = std::make_unique<Vtop>(&context, "top");
        memories = std::make_unique<Memories>(top.get(), memory_configs, violations);
        registers = std::make_unique<RegisterPort<RegisterPins>>(RegisterPins{top.get()},
                                                                 register_config, violations);
        top->clk = 0;
        top->rst = 0;
        top->eval();
    }

    ~moeaccel_simulation() {
        waves_stop();
        top->final();
    }

    void edge() {
        top->clk = 1;
        top->eval();
        context.time(++cycle * kTicks);
    }

    void settle() {
#if MOEACCEL_WAVES
        // One more evaluation, so that inputs are seen to change just after the rising edge.
        if (waves) {
            top->eval();
            waves->dump(cycle * kTicks);
        }
#endif
        top->clk = 0;
        top->eval();
#if MOEACCEL_WAVES
        if (waves) waves->dump(cycle * kTicks + kTicks / 2);
#endif
    }

    void step() {
        memories->each([&](auto& port) { port.sample(cycle); });
        registers->sample(cycle);
        edge();
        memories->each([&](auto& port) { port.drive(cycle); });
        registers->drive();
        settle();
    }

    // A reason to come back early; MOEACCEL_CYCLES when there is none.
    int32_t trouble() const {
        if (stopped) return MOEACCEL_STOP;
        if (finished) return MOEACCEL_FINISH;
        if (strict && violations.count() != 0) return MOEACCEL_VIOLATION;
        return MOEACCEL_CYCLES;
    }

    int32_t run(uint64_t cycles, bool until_irq) {
        const uint64_t end = cycle + cycles;
        while (true) {
            if (const int32_t reason = trouble()) return reason;
            if (until_irq && top->irq) return MOEACCEL_IRQ;
            if (cycle >= end) return MOEACCEL_CYCLES;
            step();
        }
    }

    // Reset the model; memory is reset with it, or knows nothing of it and goes on.
    int32_t reset(uint64_t cycles, bool memory) {
        const auto set = [&](bool value) {
            top->rst = value;
            set_memory_reset(*top, value && memory, 0);
            settle();
        };
        const auto advance = [&] {
            if (!memory) memories->each([&](auto& port) { port.sample(cycle); });
            edge();
            if (!memory) memories->each([&](auto& port) { port.drive(cycle); });
        };
        if (memory) memories->each([](auto& port) { port.reset(); });
        registers->reset();
        advance();
        set(true);
        for (uint64_t i = 1; i <= cycles; ++i) {
            if (memory && i > kResetCycles)
                memories->each([&](auto& port) { port.sample_reset(cycle); });
            advance();
            // An assertion that failed is false until the reset has reached the registers.
            if (i == kResetCycles) stopped = finished = false;
            set(i != cycles);
        }
        return trouble();
    }

    // Finish the transaction that the register master was given.
    int32_t transaction(uint64_t timeout) {
        const uint64_t end = cycle + timeout;
        while (registers->busy()) {
            if (const int32_t reason = trouble()) return reason;
            if (cycle >= end) return MOEACCEL_TIMEOUT;
            step();
        }
        const int32_t reason = trouble();
        return reason ? reason : MOEACCEL_DONE;
    }

    int32_t waves_start(const char* path) {
#if MOEACCEL_WAVES
        waves_stop();
        // The writer does not say when it cannot.
        std::FILE* file = std::fopen(path, "wb");
        if (file == nullptr) return 2;
        std::fclose(file);
        waves = std::make_unique<VerilatedFstC>();
        top->trace(waves.get(), 99);
        waves->open(path);
        return 0;
#else
        (void)path;
        return 1;
#endif
    }

    void waves_stop() {
#if MOEACCEL_WAVES
        if (waves) waves->close();
        waves.reset();
#endif
    }

    void print(const std::string& text) {
        log += text;
        if (log.size() > 2 * kLogBytes) log.erase(0, log.size() - kLogBytes);
    }

    static constexpr uint64_t kResetCycles = 2;  // edges until every register is reset
    static constexpr size_t kLogBytes = 1 << 16;
    static constexpr uint64_t kTicks = 10;  // of the model's time, and of waves, in a cycle

    const bool strict;
    VerilatedContext context;
    std::unique_ptr<Vtop> top;
    Violations violations;
    std::unique_ptr<Memories> memories;
    std::unique_ptr<RegisterPort<RegisterPins>> registers;
    uint64_t cycle = 0;
    bool stopped = false, finished = false;
    std::string log;
#if MOEACCEL_WAVES
    std::unique_ptr<VerilatedFstC> waves;
#endif
};

// -- what the model's run time calls ---------------------------------------------------------------

namespace {

thread_local moeaccel_simulation* current = nullptr;
thread_local std::string orphaned;  // printed while no handle exists yet

void print(const std::string& text) {
    if (current) {
        current->print(text);
    } else {
        orphaned += text;
    }
}

// Messages and stops raised during a call belong to the handle of that call.
struct Enter {
    explicit Enter(moeaccel_simulation* simulation) : before(current) { current = simulation; }
    ~Enter() { current = before; }
    moeaccel_simulation* before;
};

template <class Call>
int32_t guarded(moeaccel_simulation* simulation, Call call) {
    Enter enter(simulation);
    try {
        return call();
    } catch (const std::exception& error) {
        simulation->print(std::string(error.what()) + "\n");
        simulation->stopped = true;
        return MOEACCEL_STOP;
    }
}

}  // namespace

int moeaccel_model_printf(const char* format, ...) {
    char text[4096];
    va_list arguments;
    va_start(arguments, format);
    const int length = std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    print(text);
    return length;
}

void vl_finish(const char* filename, int line, const char*) VL_MT_UNSAFE {
    print(std::string(filename) + ":" + std::to_string(line) + ": $finish\n");
    if (current) current->finished = true;
}

void vl_stop(const char* filename, int line, const char*) VL_MT_UNSAFE {
    print(std::string(filename) + ":" + std::to_string(line) + ": stopped\n");
    if (current) current->stopped = true;
}

void vl_fatal(const char* filename, int line, const char*, const char* message) VL_MT_UNSAFE {
    throw std::runtime_error(std::string(filename) + ":" + std::to_string(line) + ": " + message);
}

// -- the C interface -------------------------------------------------------------------------------

uint32_t moeaccel_api_version(void) { return MOEACCEL_API_VERSION; }
uint32_t moeaccel_port_count(void) { return kPorts; }

uint32_t moeaccel_data_bytes(void) {
    uint32_t bytes = 0;
#define BYTES(port) bytes = MemoryPort<MemoryPins_##port>::kBytes;
    MOEACCEL_MEMORY_PORTS(BYTES)
#undef BYTES
    return bytes;
}

moeaccel_simulation* moeaccel_open(const moeaccel_memory_config* memories,
                                   const moeaccel_register_config* registers, uint32_t strict,
                                   char* message, uint64_t message_size) {
    try {
        orphaned.clear();
        return new moeaccel_simulation(memories, *registers, strict != 0);
    } catch (const std::exception& error) {
        std::snprintf(message, message_size, "%s%s", orphaned.c_str(), error.what());
        return nullptr;
    }
}

void moeaccel_close(moeaccel_simulation* simulation) {
    Enter enter(simulation);
    delete simulation;
}

int32_t moeaccel_reset(moeaccel_simulation* simulation, uint64_t cycles, uint32_t memory) {
    return guarded(simulation, [&] { return simulation->reset(cycles, memory != 0); });
}

int32_t moeaccel_run(moeaccel_simulation* simulation, uint64_t cycles, uint32_t until_irq) {
    return guarded(simulation, [&] { return simulation->run(cycles, until_irq != 0); });
}

uint64_t moeaccel_cycle(const moeaccel_simulation* simulation) { return simulation->cycle; }
uint32_t moeaccel_irq(const moeaccel_simulation* simulation) { return simulation->top->irq; }

int32_t moeaccel_register_read(moeaccel_simulation* simulation, uint32_t address, uint64_t timeout,
                               uint32_t* value, uint32_t* response) {
    return guarded(simulation, [&] {
        if (simulation->registers->busy()) return int32_t(MOEACCEL_TIMEOUT);
        simulation->registers->start_read(address);
        const int32_t reason = simulation->transaction(timeout);
        *value = simulation->registers->value();
        *response = simulation->registers->response();
        return reason;
    });
}

int32_t moeaccel_register_write(moeaccel_simulation* simulation, uint32_t address, uint32_t value,
                                uint32_t strobe, uint64_t timeout, uint32_t* response) {
    return guarded(simulation, [&] {
        if (simulation->registers->busy()) return int32_t(MOEACCEL_TIMEOUT);
        simulation->registers->start_write(address, value, strobe);
        const int32_t reason = simulation->transaction(timeout);
        *response = simulation->registers->response();
        return reason;
    });
}

void moeaccel_inject_error(moeaccel_simulation* simulation, uint32_t port, uint64_t first,
                           uint64_t last, uint32_t response, uint32_t reads, uint32_t writes) {
    simulation->memories->one(port, [&](auto& memory) {
        memory.inject_error(first, last, response, reads != 0, writes != 0);
    });
}

void moeaccel_clear_errors(moeaccel_simulation* simulation, uint32_t port) {
    simulation->memories->one(port, [](auto& memory) { memory.clear_errors(); });
}

void moeaccel_read_stats(const moeaccel_simulation* simulation, uint32_t port,
                         moeaccel_stats* stats) {
    simulation->memories->one(port, [&](auto& memory) { *stats = memory.stats(); });
}

void moeaccel_clear_stats(moeaccel_simulation* simulation, uint32_t port) {
    simulation->memories->one(port, [](auto& memory) { memory.clear_stats(); });
}

uint64_t moeaccel_violation_count(const moeaccel_simulation* simulation) {
    return simulation->violations.count();
}

const char* moeaccel_violation(const moeaccel_simulation* simulation, uint64_t index,
                               uint64_t* cycle, const char** channel) {
    const auto& kept = simulation->violations.kept();
    if (index >= kept.size()) return nullptr;
    *cycle = kept[index].cycle;
    *channel = kept[index].channel.c_str();
    return kept[index].text.c_str();
}

void moeaccel_clear_violations(moeaccel_simulation* simulation) { simulation->violations.clear(); }

const char* moeaccel_log(const moeaccel_simulation* simulation) { return simulation->log.c_str(); }

int32_t moeaccel_waves_start(moeaccel_simulation* simulation, const char* path) {
    return guarded(simulation, [&] { return simulation->waves_start(path); });
}

void moeaccel_waves_stop(moeaccel_simulation* simulation) { simulation->waves_stop(); }
