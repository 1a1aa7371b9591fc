#pragma once
// Runs the commands as a person does: TPCHECK_CANARY is the path of tpcheck with the canary for its
// operators.

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <regex>
#include <string>
#include <thread>

#include "harness/base/temp_folder_testing.h"

namespace tp {

namespace fs = std::filesystem;

inline bool mentions(const std::string& text, const std::string& word) {
  return text.find(word) != std::string::npos;
}

// A safetensors file with this header.
inline void write_tensors(const fs::path& path, std::string header, const std::string& data) {
  header.resize((header.size() + 7) / 8 * 8, ' ');
  std::ofstream file(path);
  const std::uint64_t length = header.size();
  file.write(reinterpret_cast<const char*>(&length), 8);
  file << header << data;
}

// A folder with a config.json and, in one file, one tensor of this name.
inline void write_checkpoint(const fs::path& directory, const std::string& tensor) {
  fs::create_directories(directory);
  std::ofstream(directory / "config.json") << R"({"hidden_size": 64, "num_attention_heads": 4,
      "num_key_value_heads": 2, "quantization_config":
      {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}})";
  write_tensors(
      directory / "model.safetensors",
      fmt::format(R"({{"{}": {{"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}}})", tensor),
      "1234");
}

// A folder with a config.json, and no tensors.
inline void write_base(const fs::path& directory) {
  fs::create_directories(directory);
  std::ofstream(directory / "config.json")
      << R"({"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2})";
}

// An adapter of this module, of rank 1.
inline void write_adapter(const fs::path& directory, const std::string& module) {
  fs::create_directories(directory);
  std::ofstream(directory / "adapter_config.json")
      << fmt::format(R"({{"peft_type": "LORA", "r": 1, "target_modules": ["{}"]}})", module);
  const auto tensor = [&](const char* part, const char* bytes) {
    return fmt::format(
        R"("base_model.model.{}.lora_{}.weight": {{"dtype": "F32", "shape": [1, 1], )"
        R"("data_offsets": {}}})",
        module, part, bytes);
  };
  write_tensors(directory / "adapter_model.safetensors",
                "{" + tensor("A", "[0, 4]") + ", " + tensor("B", "[4, 8]") + "}", "12345678");
}

struct Ran {
  int code = -1;
  std::string out;
};

// Runs a shell command in an empty folder.
class CommandsTest : public testing::Test {
 protected:
  Ran shell(const std::string& command) const {
    Ran ran;
    std::FILE* pipe = popen(fmt::format("cd {} && {}", folder_.string(), command).c_str(), "r");
    std::array<char, 4096> buffer;
    for (std::size_t n; (n = std::fread(buffer.data(), 1, buffer.size(), pipe)) > 0;)
      ran.out.append(buffer.data(), n);
    const int status = pclose(pipe);
    ran.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    return ran;
  }
  Ran tpcheck(const std::string& arguments) const {
    return shell(fmt::format("{} {} 2>stderr.txt", TPCHECK_CANARY, arguments));
  }
  std::string errors() const {
    std::ifstream in(folder_ / "stderr.txt");
    return {std::istreambuf_iterator<char>(in), {}};
  }
  // Starts a command, sends it a signal once `ready`, and returns its exit status. Its output goes
  // to stdout.txt and stderr.txt, its temporary files to jobs/.
  int interrupt(const std::string& arguments, int signal,
                const std::function<bool()>& ready) const {
    fs::create_directory(folder_ / "jobs");
    // `ready` is not to see what an earlier command said.
    for (const char* file : {"stdout.txt", "stderr.txt"}) fs::remove(folder_ / file);
    const std::string command =
        fmt::format("cd {0} && {1} TPCHECK_TMPDIR={0}/jobs exec {2} {3} >stdout.txt 2>stderr.txt",
                    folder_.string(), environment_, TPCHECK_CANARY, arguments);
    const pid_t pid = fork();
    if (pid == 0) {
      setpgid(0, 0);
      execl("/bin/sh", "sh", "-c", command.c_str(), nullptr);
      _exit(127);
    }
    EXPECT_TRUE(soon(ready)) << errors();
    kill(pid, signal);
    int status = 0;
    waitpid(pid, &status, 0);
    return status;
  }
  static bool soon(const std::function<bool()>& condition) {
    for (int i = 0; i < 200 && !condition(); ++i)
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
    return condition();
  }
  std::string output() const {
    std::ifstream in(folder_ / "stdout.txt");
    return {std::istreambuf_iterator<char>(in), {}};
  }
  bool kept_a_case() const {
    std::error_code none_yet;
    for (const auto& entry : fs::directory_iterator(folder_ / "findings", none_yet)) {
      if (entry.path().extension() == ".case") return true;
    }
    return false;
  }

  static std::string replay_arguments(const std::string& out) {
    std::smatch match;
    return std::regex_search(out, match, std::regex("\\./tpcheck (replay '[^']*'.*)"))
               ? match[1].str()
               : "";
  }

  const TempFolder temp_;
  const fs::path folder_ = temp_.path();
  std::string environment_;  // NAME=VALUE ... of what interrupt() starts
};

}  // namespace tp
