// Threads of a block as fibers of one host thread: each runs until it waits, then the next does.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace loraspan::emulation {

#if defined(__x86_64__)
// A context is the stack pointer of who waits; the registers that a call keeps are on its stack.
using Context = void*;

// rdi: where the old stack pointer goes; rsi: the new one.
asm(R"(
.text
.weak loraspan_switch_stacks
.type loraspan_switch_stacks, @function
loraspan_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size loraspan_switch_stacks, .-loraspan_switch_stacks
)");
extern "C" void loraspan_switch_stacks(void** from, void* to);

inline void swap(Context& from, Context& to) { loraspan_switch_stacks(&from, to); }

inline void prepare(Context& context, char* stack, std::size_t size, void (*entry)()) {
  // room for six registers, the address to return to, and a frame that is aligned as after a call
  auto** top = reinterpret_cast<void**>((reinterpret_cast<std::uintptr_t>(stack) + size) & ~std::uintptr_t{15});
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context = top;
}
#else
using Context = ucontext_t;

inline void swap(Context& from, Context& to) { swapcontext(&from, &to); }

inline void prepare(Context& context, char* stack, std::size_t size, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = size;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

enum class State { ready, at_warp, at_block, done };

class Fibers {
 public:
  // Runs `body` on `count` fibers; `resumed` is told the number of each before it goes on. False if they wait forever.
  bool run(int count, const std::function<void()>& body, const std::function<void(int)>& resumed, int order) {
    while (static_cast<int>(stacks_.size()) < count) stacks_.push_back(static_cast<char*>(std::malloc(kStack)));
    contexts_.resize(stacks_.size());
    states_.assign(static_cast<std::size_t>(count), State::ready);
    body_ = &body;
    for (int i = 0; i < count; ++i) prepare(contexts_[at(i)], stacks_[at(i)], kStack, &Fibers::enter);
    for (;;) {
      for (int turn = 0; turn < count; ++turn) {
        const int i = pick(turn, count, order);
        if (states_[at(i)] != State::ready) continue;
        current_ = i;
        resumed(i);
        leave(main_, contexts_[at(i)], stacks_[at(i)], false);
      }
      random_ = random_ * 6364136223846793005u + 1442695040888963407u;
      if (!release(count)) return all(0, count, State::done);
    }
  }

  // Called on a fiber: waits for the others of its warp or its block.
  void wait(State state) {
    const int self = current_;
    states_[at(self)] = state;
    leave(contexts_[at(self)], main_, nullptr, state == State::done);
  }

  static Fibers& instance() {
    static Fibers fibers;
    return fibers;
  }

 private:
  static constexpr std::size_t kStack = 1 << 17;

  static std::size_t at(int i) { return static_cast<std::size_t>(i); }

  static void enter() {
    Fibers& fibers = instance();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &fibers.bottom_, &fibers.size_);
#endif
    (*fibers.body_)();
    fibers.wait(State::done);
  }

  // The sanitizer is told which stack is in use; `last` where this one is never come back to.
  void leave(Context& from, Context& to, [[maybe_unused]] char* stack, [[maybe_unused]] bool last) {
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(last ? nullptr : &fake, stack ? stack : bottom_, stack ? kStack : size_);
    swap(from, to);
    __sanitizer_finish_switch_fiber(fake, stack ? nullptr : &bottom_, stack ? nullptr : &size_);
#else
    swap(from, to);
#endif
  }

  // The fiber whose turn it is: forward, in reverse, or by a permutation that is drawn anew each round.
  int pick(int turn, int count, int order) const {
    if (order == 0) return turn;
    if (order == 1) return count - 1 - turn;
    // an odd factor permutes a power of two; counts are multiples of 32
    int size = 1;
    while (size < count) size *= 2;
    const int factor = static_cast<int>(random_ >> 33 & 0x3ffu) | 1, offset = static_cast<int>(random_ >> 48 & 0x3ffu);
    int i = (turn * factor + offset) % size;
    while (i >= count) i = (i + factor * count) % size;
    return i;
  }

  bool all(int first, int count, State state) const {
    for (int i = first; i < first + count; ++i)
      if (states_[at(i)] != state && states_[at(i)] != State::done) return false;
    return true;
  }

  // Lets those go on whose company is complete; false if there are none.
  bool release(int count) {
    bool any = false;
    for (int first = 0; first < count; first += 32) {
      const int lanes = count - first < 32 ? count - first : 32;
      if (all(first, lanes, State::at_warp)) any |= wake(first, lanes, State::at_warp);
    }
    if (!any && all(0, count, State::at_block)) any = wake(0, count, State::at_block);
    return any;
  }

  bool wake(int first, int count, State state) {
    bool any = false;
    for (int i = first; i < first + count; ++i)
      if (states_[at(i)] == state) states_[at(i)] = State::ready, any = true;
    return any;
  }

  std::vector<char*> stacks_;
  std::vector<Context> contexts_;
  std::vector<State> states_;
  const std::function<void()>* body_ = nullptr;
  Context main_{};
  int current_ = 0;
  std::uint64_t random_ = 20261122;
  [[maybe_unused]] const void* bottom_ = nullptr;
  [[maybe_unused]] std::size_t size_ = 0;
};

}  // namespace loraspan::emulation
