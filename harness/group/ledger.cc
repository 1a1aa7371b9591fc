#include "harness/group/ledger.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <new>
#include <vector>

#include "harness/base/check.h"

namespace tp {

namespace {

template <std::size_t N>
void copy_text(char (&to)[N], std::string_view from) {
  TP_CHECK(from.size() < N, "a name too long for a header");
  std::memcpy(to, from.data(), from.size());
}

}  // namespace

CollectiveHeader make_header(std::int64_t sequence, std::string_view operation, std::int64_t count,
                             std::string_view dtype) {
  CollectiveHeader h;
  h.sequence = sequence;
  h.count = count;
  copy_text(h.operation, operation);
  copy_text(h.dtype, dtype);
  return h;
}

std::string describe(const CollectiveHeader& h) {
  if (std::string_view(h.operation) == kEnd)
    return fmt::format("end of case after {} collectives", h.sequence - 1);
  const std::string on =
      h.communicator == 0 ? "" : fmt::format(" on communicator {}", h.communicator);
  const std::string of = h.dtype[0] == 0 ? "" : fmt::format(" of {} {}", h.count, h.dtype);
  const std::string from = h.root < 0 ? "" : fmt::format(" from root {}", h.root);
  return fmt::format("#{} {}{}{}{}", h.sequence, h.operation, of, from, on);
}

void LedgerPage::begin_case(int first, int count) {
  TP_CHECK(count <= kRanks, "too many ranks in one process");
  first_rank = first;
  num_ranks = count;
  std::fill_n(ranks.begin(), count, Rank{});
}

void LedgerPage::enter(int tp_rank, const CollectiveHeader& header) {
  Rank& rank = ranks[std::size_t(tp_rank - first_rank)];
  rank.ring[std::size_t(rank.entered++ % kRing)] = header;
}

LedgerPage& ledger_page(int process) {
  static LedgerPage* const page = [process]() -> LedgerPage* {
    const char* folder = std::getenv("TPCHECK_LEDGER");
    if (!folder) return new LedgerPage;
    const std::string path = fmt::format("{}/process-{}", folder, process);
    const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC, 0600);
    TP_CHECK(fd >= 0 && ftruncate(fd, sizeof(LedgerPage)) == 0, "cannot make the ledger " + path);
    void* memory = mmap(nullptr, sizeof(LedgerPage), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    TP_CHECK(memory != MAP_FAILED, "cannot map the ledger " + path);
    close(fd);
    return new (memory) LedgerPage;
  }();
  return *page;
}

std::string read_ledgers(const std::string& folder) {
  std::vector<std::unique_ptr<LedgerPage>> pages;
  for (int process = 0;; ++process) {
    std::ifstream file(fmt::format("{}/process-{}", folder, process), std::ios::binary);
    auto page = std::make_unique<LedgerPage>();
    if (!file.read(reinterpret_cast<char*>(page.get()), sizeof(LedgerPage))) break;
    pages.push_back(std::move(page));
  }
  std::string text;
  std::int64_t most = 0;
  for (const auto& page : pages) {
    const RunningNow& now = page->running;
    if (now.tp_rank >= 0) {
      if (!text.empty()) text += "; ";
      text += fmt::format("tp_rank {} was in {}", now.tp_rank, now.what);
      if (now.signal)
        text += fmt::format(" (signal {}, {})", int(now.signal), strsignal(now.signal));
    }
    for (int r = 0; r < page->num_ranks; ++r)
      most = std::max(most, page->ranks[std::size_t(r)].entered);
  }
  for (const auto& page : pages) {
    for (int r = 0; r < page->num_ranks; ++r) {
      const auto entered = page->ranks[std::size_t(r)].entered;
      if (entered == most) continue;
      if (!text.empty()) text += "; ";
      text += fmt::format("tp_rank {} entered {} collectives, others {}", page->first_rank + r,
                          entered, most);
    }
  }
  return text;
}

}  // namespace tp
