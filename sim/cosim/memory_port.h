// One AXI4 slave: a memory with a timing model, which has the master that talks to it checked.
//
// In every cycle the harness calls sample() with the pins settled, just before the rising edge, and
// drive() after it. Everything this side drives comes from registers: no path leads from an input
// to an output within a cycle, so two evaluations of the model make a cycle.
//
// Writes reach the memory when their response is first offered, not before, and reads take their
// data when a beat is first offered: a master that does not wait for its acknowledgements reads old
// data here, as it may on silicon.

#pragma once

#include <algorithm>
#include <memory>

#include "bandwidth.h"
#include "port_checker.h"
#include "support.h"

namespace moeaccel {

enum Response : uint8_t { kOkay = 0, kSlaveError = 2, kDecodeError = 3 };

template <class Pins>
class MemoryPort {
    using Data = std::remove_reference_t<decltype(std::declval<Pins>().wdata())>;
    using Strobe = std::remove_reference_t<decltype(std::declval<Pins>().wstrb())>;

public:
    static constexpr unsigned kBytes = sizeof(Data);
    static_assert(kBytes >= 4 && kBytes <= 128 && (kBytes & (kBytes - 1)) == 0,
                  "the data width must be a power of two of 32 to 1024 bits");

    MemoryPort(Pins pins, const moeaccel_memory_config& config, Violations& violations)
        : pins_(pins), config_(config), checker_(pins.name(), config, violations),
          random_(config.seed), bandwidth_(config, kBytes) {
        for (int i = 0; i < MOEACCEL_CHANNELS; ++i) {
            stall_[i] = Stall(config.stall[i], config.stall_length);
            random_mode_ |= stall_[i].enabled();
        }
        random_mode_ |= config.reorder || config.interleave ||
                        config.read_latency_most > config.read_latency ||
                        config.write_latency_most > config.write_latency;
        rows_.assign(config.row_bytes ? config.banks : 0, Bank{});
        clear_stats();
        reset();
    }

    // Forget every transaction and drive idle pins.
    void reset() {
        reads_.clear();
        while (!writes_.empty()) release_write(0);
        addressed_ = filled_ = 0;
        arready_ = awready_ = wready_ = rvalid_ = bvalid_ = false;
        reading_ = kNone;
        aw_ = Address{};
        ar_ = Address{};
        checker_.reset();
        bandwidth_.reset();
        refresh_phase_ = 0;
        for (Bank& bank : rows_) bank = Bank{};
        pins_.arready() = 0;
        pins_.awready() = 0;
        pins_.wready() = 0;
        pins_.rvalid() = 0;
        pins_.bvalid() = 0;
    }

    void sample_reset(uint64_t cycle) {
        checker_.check_reset(cycle, "AR", pins_.arvalid());
        checker_.check_reset(cycle, "AW", pins_.awvalid());
        checker_.check_reset(cycle, "W", pins_.wvalid());
    }

    void sample(uint64_t cycle) {
        if (pins_.arvalid() | ar_.waiting) sample_ar(cycle);
        if (pins_.awvalid() | aw_.waiting) sample_aw(cycle);
        if (pins_.wvalid() | checker_.write_data_waits()) sample_w(cycle);
        if (rvalid_) sample_r(cycle);
        if (bvalid_) sample_b(cycle);
        stats_.read_busy_cycles += !reads_.empty();
    }

    void drive(uint64_t cycle) {
        bool refreshing = false;
        if (config_.refresh_interval != 0) refreshing = refresh();
        if (!refreshing) bandwidth_.gain();

        // Data without RVALID means nothing: show it, where the run is meant to find mistakes.
        if (random_mode_ && !rvalid_) std::memset(static_cast<void*>(&pins_.rdata()), 0xA5, kBytes);
        const bool r_stalled = stalled(MOEACCEL_R) | refreshing;
        if (!refreshing) bandwidth_.drain(!reads_.empty());
        if (!rvalid_ && !r_stalled && !reads_.empty() && bandwidth_.can_read()) {
            const size_t next = next_read(cycle);
            if (next != kNone) offer_r(next, cycle);
        }
        if (!refreshing) bandwidth_.drain_rest();
        const bool w_stalled = stalled(MOEACCEL_W) | refreshing;
        wready_ = config_.never_refuse ||
                  (!w_stalled && writes_.size() <= config_.max_writes && bandwidth_.can_write());
        pins_.wready() = wready_;
        if (addressed_ > filled_)
            checker_.check_patience(cycle, w_progress_, "W", "the data of an accepted address");

        const bool b_stalled = stalled(MOEACCEL_B) | refreshing;
        if (!bvalid_ && !b_stalled && !writes_.empty()) offer_b(cycle);

        arready_ = !stalled(MOEACCEL_AR) && (config_.never_refuse || reads_.size() < config_.max_reads);
        awready_ = !stalled(MOEACCEL_AW) && (config_.never_refuse || addressed_ < config_.max_writes);
        pins_.arready() = arready_;
        pins_.awready() = awready_;
        pins_.rvalid() = rvalid_;
        pins_.bvalid() = bvalid_;
    }

    void inject_error(uint64_t first, uint64_t last, uint32_t response, bool reads, bool writes) {
        errors_.push_back({first, last, uint8_t(response), reads, writes});
    }
    void clear_errors() { errors_.clear(); }

    const moeaccel_stats& stats() const { return stats_; }
    void clear_stats() {
        stats_ = moeaccel_stats{};
        stats_.first_read_cycle = stats_.last_read_cycle = ~uint64_t{0};
        stats_.first_write_cycle = stats_.last_write_cycle = ~uint64_t{0};
    }

private:
    static constexpr size_t kNone = ~size_t{0};
    // Pending bursts whose rows a controller opens ahead of their turn.
    static constexpr size_t kRowsAhead = 16;

    struct Read {
        uint64_t address = 0;  // of the next beat, aligned
        uint64_t first = 0, last = 0;
        uint64_t accepted = 0;
        uint64_t ready = 0;  // the cycle of the first beat at the earliest
        uint32_t id = 0, left = 0;
        bool row_open = false;
    };

    struct Write {
        uint64_t address = 0, first = 0, last = 0;
        uint64_t ready = 0;
        uint32_t id = 0, beats = 0, taken = 0;
        bool has_address = false, has_data = false;
        std::vector<uint8_t> data;
        std::vector<Strobe> strobes;
    };

    struct Error {
        uint64_t first, last;
        uint8_t response;
        bool reads, writes;
    };

    struct Bank {
        uint64_t row = ~uint64_t{0};
        uint64_t ready = 0;
    };

    // Cycles between two bounds: every power of two is as likely as every other.
    uint64_t latency(uint32_t least, uint32_t most) {
        if (most <= least) return least;
        uint32_t octaves = 1;
        while (uint64_t{least} << octaves <= most) ++octaves;
        const uint64_t low = uint64_t{least} << random_.below(octaves);
        return std::min<uint64_t>(low + random_.below(uint32_t(low)), most);
    }

    bool stalled(int channel) { return stall_[channel].enabled() && stall_[channel].blocked(random_); }

    bool refresh() {
        const bool refreshing = refresh_phase_ < config_.refresh_cycles;
        if (refresh_phase_ == 0) {
            for (Bank& bank : rows_) bank.row = ~uint64_t{0};
        }
        if (++refresh_phase_ == config_.refresh_interval) refresh_phase_ = 0;
        return refreshing;
    }

    // -- address channels ------------------------------------------------------------------------

    static uint64_t align(uint64_t address) { return address & ~uint64_t{kBytes - 1}; }

    void sample_ar(uint64_t cycle) {
        Address now;
        now.address = pins_.araddr();
        now.id = pins_.arid();
        now.length = pins_.arlen();
        now.size = pins_.arsize();
        now.burst = pins_.arburst();
        const bool valid = pins_.arvalid();
        checker_.check_address(cycle, "AR", ar_, now, valid, arready_);
        if (!valid || !arready_) return;

        Read read;
        read.address = align(now.address);
        read.first = now.address;
        read.last = read.address + (uint64_t(now.length) + 1) * kBytes - 1;
        read.id = now.id;
        read.left = now.length + 1;
        read.accepted = cycle;
        read.ready = cycle + latency(config_.read_latency, config_.read_latency_most);
        if (read.left == 1) read.ready += config_.last_beat_delay;
        checker_.check_burst(cycle, "AR", now, read.last);
        if (config_.check_races) {
            for (size_t i = 0; i < addressed_; ++i) {
                if (overlap(writes_[i], read)) {
                    checker_.violation(cycle, "AR", "read of " + hex(read.first) +
                                                        " before the write to it is acknowledged");
                }
            }
        }
        reads_.push(read);
        ++stats_.read_bursts;
        stats_.most_reads = std::max<uint64_t>(stats_.most_reads, reads_.size());
        if (!rows_.empty()) open_rows(cycle);
    }

    void sample_aw(uint64_t cycle) {
        Address now;
        now.address = pins_.awaddr();
        now.id = pins_.awid();
        now.length = pins_.awlen();
        now.size = pins_.awsize();
        now.burst = pins_.awburst();
        const bool valid = pins_.awvalid();
        checker_.check_address(cycle, "AW", aw_, now, valid, awready_);
        if (!valid || !awready_) return;

        if (addressed_ == writes_.size()) writes_.push(fresh_write());
        Write& write = *writes_[addressed_];
        write.has_address = true;
        write.address = align(now.address);
        write.first = now.address;
        write.last = write.address + (uint64_t(now.length) + 1) * kBytes - 1;
        write.id = now.id;
        write.beats = now.length + 1;
        checker_.check_burst(cycle, "AW", now, write.last);
        if (config_.check_races) {
            for (size_t i = 0; i < addressed_; ++i) {
                if (overlap(writes_[i], write)) {
                    checker_.violation(cycle, "AW", "write to " + hex(write.first) +
                                                        " before an earlier one is acknowledged");
                }
            }
            for (size_t i = 0; i < reads_.size(); ++i) {
                if (overlap(&reads_[i], write)) {
                    checker_.violation(cycle, "AW", "write to " + hex(write.first) +
                                                        " while a read of it is outstanding");
                }
            }
        }
        if (write.taken > write.beats || (write.has_data && write.taken != write.beats)) {
            checker_.violation(cycle, "W", wlast_text(write));
        }
        if (!write.has_data && write.taken >= write.beats) finish_data(write);
        if (addressed_++ == filled_) w_progress_ = cycle;
        ++stats_.write_bursts;
        stats_.most_writes = std::max<uint64_t>(stats_.most_writes, addressed_);
        if (write.has_data) complete(write, cycle);
    }

    template <class A, class B>
    static bool overlap(A* a, const B& b) {
        return a->first <= b.last && b.first <= a->last;
    }

    static std::string wlast_text(const Write& write) {
        return "WLAST does not fit the burst at " + hex(write.first) + ": " +
               std::to_string(write.taken) + " beats of data, " + std::to_string(write.beats) +
               " by its address";
    }

    // -- write data ------------------------------------------------------------------------------

    void sample_w(uint64_t cycle) {
        const bool valid = pins_.wvalid();
        checker_.check_write_data(cycle, pins_.wdata(), pins_.wstrb(), pins_.wlast(), valid,
                                  wready_);
        stats_.write_wait_cycles += valid && !wready_;
        if (!valid || !wready_) return;

        bandwidth_.write();
        w_progress_ = cycle;
        if (stats_.write_beats++ == 0) stats_.first_write_cycle = cycle;
        stats_.last_write_cycle = cycle;

        if (filled_ >= addressed_ && !(pins_.awvalid() && filled_ == addressed_)) {
            checker_.violation(cycle, "W",
                               "write data without an address, neither accepted nor offered");
        }
        if (filled_ == writes_.size()) writes_.push(fresh_write());
        Write& write = *writes_[filled_];
        const auto* bytes = reinterpret_cast<const uint8_t*>(&pins_.wdata());
        write.data.insert(write.data.end(), bytes, bytes + kBytes);
        write.strobes.push_back(pins_.wstrb());
        ++write.taken;
        const bool last = pins_.wlast();
        bool end = last;
        if (write.has_address) {
            // The address decides where the burst ends, whatever WLAST says.
            end = write.taken == write.beats;
            if (end != last)
                checker_.violation(cycle, "W", last ? wlast_text(write) : "WLAST is missing in "
                                   "beat " + std::to_string(write.taken) + " of the burst at " +
                                   hex(write.first));
        }
        if (end) {
            finish_data(write);
            if (write.has_address) complete(write, cycle);
        }
    }

    void finish_data(Write& write) {
        write.has_data = true;
        ++filled_;
    }

    void complete(Write& write, uint64_t cycle) {
        write.ready = cycle + latency(config_.write_latency, config_.write_latency_most);
        if (!rows_.empty()) {
            Bank& bank = rows_[(write.first / config_.row_bytes) % rows_.size()];
            bank.row = write.first / config_.row_bytes;
        }
    }

    // -- responses to writes ---------------------------------------------------------------------

    void offer_b(uint64_t cycle) {
        size_t chosen = kNone;
        if (!config_.reorder) {
            if (is_ready(*writes_[0], cycle)) chosen = 0;
        } else {
            chosen = pick(addressed_, cycle, [&](size_t i) -> Write& { return *writes_[i]; });
        }
        if (chosen == kNone) return;
        Write& write = *writes_[chosen];
        responding_ = chosen;
        b_since_ = cycle;
        pins_.bid() = write.id;
        pins_.bresp() = commit(write);
        bvalid_ = true;
        checker_.check_whole_blocks(cycle, write.address, write.last);
    }

    uint8_t commit(const Write& write) {
        uint8_t worst = kOkay;
        const bool clean = write.last < config_.size && write.last >= write.first &&
                           !hits_error(write.first, write.last, false);
        for (uint32_t beat = 0; beat < write.beats && beat < write.taken; ++beat) {
            const uint64_t address = write.address + uint64_t(beat) * kBytes;
            const uint8_t response = clean ? uint8_t(kOkay) : respond(address, false);
            worst = std::max(worst, response);
            if (response != kOkay) continue;
            checker_.mark_written(address, write.strobes[beat]);
            const uint8_t* source = write.data.data() + size_t(beat) * kBytes;
            uint8_t* target = config_.data + address;
            const auto* strobes = reinterpret_cast<const uint8_t*>(&write.strobes[beat]);
            for (unsigned group = 0; group < kBytes; group += 8) {
                const unsigned mask = kBytes == 4 ? strobes[0] & 15u : strobes[group / 8];
                const unsigned width = kBytes == 4 ? 4 : 8;
                if (mask == (1u << width) - 1) {
                    std::memcpy(target + group, source + group, width);
                    stats_.bytes_written += width;
                } else {
                    for (unsigned i = 0; i < width; ++i) {
                        if ((mask >> i & 1) == 0) continue;
                        target[group + i] = source[group + i];
                        ++stats_.bytes_written;
                    }
                }
            }
        }
        return worst;
    }

    void sample_b(uint64_t cycle) {
        if (pins_.bready()) {
            bvalid_ = false;
            release_write(responding_);
        } else {
            checker_.check_patience(cycle, b_since_, "B", "BREADY, while a response waits");
        }
    }

    Write* fresh_write() {
        if (spare_.empty()) {
            all_writes_.push_back(std::make_unique<Write>());
            spare_.push_back(all_writes_.back().get());
        }
        Write* write = spare_.back();
        spare_.pop_back();
        std::vector<uint8_t> data = std::move(write->data);
        std::vector<Strobe> strobes = std::move(write->strobes);
        *write = Write{};
        data.clear();
        strobes.clear();
        write->data = std::move(data);
        write->strobes = std::move(strobes);
        return write;
    }

    void release_write(size_t index) {
        Write* write = writes_[index];
        if (write->has_address && addressed_ > 0) --addressed_;
        if (write->has_data && filled_ > 0) --filled_;
        writes_.erase(index);
        spare_.push_back(write);
    }

    // -- reads -----------------------------------------------------------------------------------

    static bool is_ready(const Read& read, uint64_t cycle) { return read.ready <= cycle; }
    static bool is_ready(const Write& write, uint64_t cycle) {
        return write.has_address && write.has_data && write.ready <= cycle;
    }

    // Any burst that is ready and the oldest one of its id.
    template <class Get>
    size_t pick(size_t count, uint64_t cycle, Get get) {
        uint64_t seen[4] = {0, 0, 0, 0};
        size_t chosen = kNone;
        uint32_t candidates = 0;
        for (size_t i = 0; i < count; ++i) {
            const auto& burst = get(i);
            uint64_t& word = seen[(burst.id >> 6) & 3];
            const uint64_t bit = uint64_t{1} << (burst.id & 63);
            if (word & bit) continue;
            word |= bit;
            if (is_ready(burst, cycle) && random_.below(++candidates) == 0) chosen = i;
        }
        return chosen;
    }

    size_t next_read(uint64_t cycle) {
        if (reading_ != kNone && !config_.interleave) {  // a burst is under way
            return is_ready(reads_[reading_], cycle) ? reading_ : kNone;
        }
        if (config_.reorder) {
            return pick(reads_.size(), cycle, [&](size_t i) -> Read& { return reads_[i]; });
        }
        return is_ready(reads_[0], cycle) ? 0 : kNone;
    }

    void offer_r(size_t index, uint64_t cycle) {
        reading_ = index;
        Read& read = reads_[index];
        const uint8_t response = respond(read.address, true);
        if (response == kOkay) {
            std::memcpy(static_cast<void*>(&pins_.rdata()), config_.data + read.address, kBytes);
        } else {
            std::memset(static_cast<void*>(&pins_.rdata()), 0xDB, kBytes);  // nobody may use it
        }
        pins_.rid() = read.id;
        pins_.rresp() = response;
        pins_.rlast() = --read.left == 0;
        if (response == kOkay) checker_.check_written(cycle, read.address);
        read.address += kBytes;
        if (read.left == 1) read.ready = std::max(read.ready, cycle + config_.last_beat_delay);
        rvalid_ = true;
        r_since_ = cycle;
        bandwidth_.read();
    }

    void sample_r(uint64_t cycle) {
        if (!pins_.rready()) {
            ++stats_.read_wait_cycles;
            checker_.check_patience(cycle, r_since_, "R", "RREADY, while a beat waits");
            return;
        }
        rvalid_ = false;
        if (stats_.read_beats++ == 0) stats_.first_read_cycle = cycle;
        stats_.last_read_cycle = cycle;
        stats_.bytes_read += kBytes;
        if (reads_[reading_].left == 0) {
            reads_.erase(reading_);
            reading_ = kNone;
            if (!rows_.empty()) open_rows(cycle);
        }
    }

    // The controller looks a few bursts ahead and opens their rows, each bank in order.
    void open_rows(uint64_t cycle) {
        const size_t count = std::min(reads_.size(), kRowsAhead);
        for (size_t i = 0; i < count; ++i) {
            Read& read = reads_[i];
            if (read.row_open) continue;
            const uint64_t row = read.first / config_.row_bytes;
            Bank& bank = rows_[row % rows_.size()];
            bool free = true;
            for (size_t j = 0; j < i && free; ++j) {
                const uint64_t other = reads_[j].first / config_.row_bytes;
                free = other == row || other % rows_.size() != row % rows_.size();
            }
            if (!free) {
                read.ready = ~uint64_t{0};
                continue;
            }
            if (bank.row != row) {
                bank.row = row;
                bank.ready = std::max(bank.ready, cycle) + config_.row_miss_cycles;
            }
            read.ready = std::max(read.accepted + config_.read_latency, bank.ready);
            read.row_open = true;
        }
        for (size_t i = count; i < reads_.size(); ++i) {
            if (!reads_[i].row_open) reads_[i].ready = ~uint64_t{0};
        }
    }

    // -- addresses that fail ---------------------------------------------------------------------

    bool hits_error(uint64_t first, uint64_t last, bool reading) const {
        for (const Error& error : errors_) {
            if ((reading ? error.reads : error.writes) && first <= error.last && error.first <= last)
                return true;
        }
        return false;
    }

    // The response to one beat.
    uint8_t respond(uint64_t address, bool reading) const {
        if (address >= config_.size) return kSlaveError;
        for (const Error& error : errors_) {
            if ((reading ? error.reads : error.writes) && address <= error.last &&
                error.first <= address + kBytes - 1)
                return error.response;
        }
        return kOkay;
    }

    Pins pins_;
    const moeaccel_memory_config config_;
    PortChecker<Data, Strobe> checker_;
    Random random_;
    Stall stall_[MOEACCEL_CHANNELS];
    bool random_mode_ = false;
    std::vector<Error> errors_;
    moeaccel_stats stats_{};

    Bandwidth bandwidth_;
    uint32_t refresh_phase_ = 0;
    std::vector<Bank> rows_;

    Queue<Read> reads_;
    size_t reading_ = kNone;  // the burst whose beat is offered, or whose beats are under way
    bool arready_ = false, rvalid_ = false;
    uint64_t r_since_ = 0;
    Address ar_;

    Queue<Write*> writes_;
    size_t addressed_ = 0;  // so many of writes_ have their address,
    size_t filled_ = 0;     // and so many all of their data
    size_t responding_ = 0;
    bool awready_ = false, wready_ = false, bvalid_ = false;
    uint64_t b_since_ = 0;
    Address aw_;
    uint64_t w_progress_ = 0;
    std::vector<std::unique_ptr<Write>> all_writes_;
    std::vector<Write*> spare_;
};

}  // namespace moeaccel
