// A whole file in memory. Giving up its pages takes a good part of the time that touching them took: those of large
// ones wait for a thread.
#include <pthread.h>
#include <sys/mman.h>

#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "tables.hpp"

namespace loraspan::bindings {
namespace {

struct Pages {
  void* data;
  std::size_t bytes;
};

// To begin a thread takes longer than to unmap fewer bytes.
constexpr std::size_t kWorthAThread = std::size_t{1} << 20;

// Pages that nobody looks at any more, and a thread that gives them up, which ends when there are none. It is never
// destroyed: at exit the thread may be at work.
class Unmapper {
 public:
  static Unmapper& get() {
    static auto* const only = new Unmapper;
    return *only;
  }

  void take(Pages pages) {
    const std::lock_guard<std::mutex> lock(mutex_);
    waiting_.push_back(pages);
    if (at_work_) return;
    try {
      std::thread([this] { work(); }).detach();
      at_work_ = true;
    } catch (const std::system_error&) {
      waiting_.pop_back();
      munmap(pages.data, pages.bytes);
    }
  }

 private:
  Unmapper() {
    // a forked process has none of the threads, and every file that is not unmapped is on its list
    pthread_atfork([] { get().lock_both(); }, [] { get().unlock_both(); },
                   [] {
                     get().at_work_ = false;
                     get().unlock_both();
                   });
  }

  void lock_both() {
    unmapping_.lock();
    mutex_.lock();
  }

  void unlock_both() {
    mutex_.unlock();
    unmapping_.unlock();
  }

  void work() {
    while (unmap_one()) continue;
  }

  bool unmap_one() {
    const std::lock_guard<std::mutex> unmapping(unmapping_);
    Pages pages;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      at_work_ = !waiting_.empty();
      if (!at_work_) return false;
      pages = waiting_.back();
      waiting_.pop_back();
    }
#ifdef __linux__
    // first without the lock of the whole address space, which others ask for to begin threads and to get memory
    madvise(pages.data, pages.bytes, MADV_DONTNEED);
#endif
    munmap(pages.data, pages.bytes);
    return true;
  }

  // Held while pages are on no list and still mapped; nobody who gives some up waits for it.
  std::mutex unmapping_;
  // Of what follows.
  std::mutex mutex_;
  std::vector<Pages> waiting_;
  bool at_work_ = false;
};

// Private: what is written to it changes this process's copy of a page and never the file.
class Mapping {
 public:
  Mapping(int descriptor, std::size_t bytes)
      : pages_{mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE, descriptor, 0), bytes} {
    if (pages_.data != MAP_FAILED) return;
    PyErr_SetFromErrno(PyExc_OSError);
    throw py::error_already_set();
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() {
    if (pages_.bytes < kWorthAThread)
      munmap(pages_.data, pages_.bytes);
    else
      Unmapper::get().take(pages_);
  }

  py::buffer_info buffer() const {
    const auto bytes = static_cast<py::ssize_t>(pages_.bytes);
    return {pages_.data, 1, py::format_descriptor<std::uint8_t>::format(), 1, {bytes}, {1}};
  }

 private:
  Pages pages_;
};

}  // namespace

void bind_mapping(py::module_& m) {
  py::class_<Mapping>(m, "Mapping", py::buffer_protocol())
      .def(py::init<int, std::size_t>(), py::arg("descriptor"), py::arg("bytes"))
      .def_buffer(&Mapping::buffer);
}

}  // namespace loraspan::bindings
