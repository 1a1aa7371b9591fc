#include "harness/base/user_adapter.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

#include "harness/base/check.h"
#include "harness/base/text.h"

namespace tp {

namespace {

struct Opened {
  Model base;
  PeftAdapter adapter;
};

std::mutex mutex;
std::string wanted, wanted_base;
std::unique_ptr<Opened> opened;
std::uint64_t version = 0;

// find_model would take a preset's name, too, whose modules nobody knows.
Model base_model(const std::string& directory) {
  std::error_code ignored;
  if (!std::filesystem::is_directory(directory, ignored))
    throw BadInput(fmt::format("{} is no directory with the config.json of the adapter's base",
                               printable(directory)));
  Model model = find_model(directory);
  check_known(model);
  return model;
}

const Opened* open_wanted() {
  const std::lock_guard lock(mutex);
  if (wanted.empty()) return nullptr;
  if (!opened)
    opened = std::make_unique<Opened>(Opened{base_model(wanted_base), PeftAdapter(wanted)});
  return opened.get();
}

}  // namespace

void set_user_adapter(const std::string& folder, const std::string& base) {
  const std::lock_guard lock(mutex);
  wanted = folder;
  wanted_base = base;
  opened.reset();
  ++version;
}

std::uint64_t user_adapter_version() {
  const std::lock_guard lock(mutex);
  return version;
}

const PeftAdapter* user_adapter() {
  const Opened* all = open_wanted();
  return all ? &all->adapter : nullptr;
}

const Model* user_adapter_base() {
  const Opened* all = open_wanted();
  return all ? &all->base : nullptr;
}

std::string user_adapter_text() {
  constexpr std::size_t kNamed = 8;
  const Opened* all = open_wanted();
  TP_CHECK(all, "no adapter is set");
  const std::vector<PeftModule>& modules = all->adapter.modules();
  std::set<std::string> ends;  // of their names
  std::int64_t least = modules.front().rank;
  for (const PeftModule& m : modules) {
    ends.insert(printable(m.name.substr(m.name.rfind('.') + 1)));
    least = std::min(least, m.rank);
  }
  std::vector<std::string> kinds(ends.begin(), ends.end());
  if (kinds.size() > kNamed) {
    const std::size_t more = kinds.size() - kNamed;
    kinds.resize(kNamed);
    kinds.push_back(fmt::format("{} more", more));
  }
  const std::int64_t most = all->adapter.max_rank();
  return fmt::format(
      "{}: {} module{} ({}), {}{}", wanted, modules.size(), modules.size() == 1 ? "" : "s",
      fmt::join(kinds, ", "),
      least == most ? fmt::format("rank {}", most) : fmt::format("ranks {} .. {}", least, most),
      all->adapter.config().use_rslora ? ", rsLoRA" : "");
}

}  // namespace tp
