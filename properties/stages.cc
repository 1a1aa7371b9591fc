#include "properties/stages.h"

#include <memory>

namespace tp {

namespace {

std::string other_name(const std::map<std::string, std::string>& names, const std::string& name) {
  const auto other = names.find(name);
  return other == names.end() ? name : other->second;
}

// A stage's own names for inputs that have others.
class RenamedInputs : public WholeInputs {
 public:
  RenamedInputs(const WholeInputs& inputs, const std::map<std::string, std::string>& names)
      : inputs_(inputs), names_(names) {}
  const Matrix& operator[](const std::string& name) const override {
    return inputs_[other_name(names_, name)];
  }

 private:
  const WholeInputs& inputs_;
  const std::map<std::string, std::string>& names_;
};

}  // namespace

Stage renamed(Stage stage, std::string name, const Names& names) {
  const auto shared = std::make_shared<const Names>(names);
  stage.name = std::move(name);
  for (auto* list : {&stage.inputs, &stage.outputs}) {
    for (TensorSpec& t : *list) t.name = other_name(shared->tensors, t.name);
    std::erase_if(*list, [](const TensorSpec& t) { return t.name.empty(); });
  }
  stage.buffers = [buffers = stage.buffers, shared](int tp_rank) {
    std::vector<LocalBuffer> all = buffers(tp_rank);
    for (LocalBuffer& buffer : all) {
      buffer.name = other_name(shared->buffers, buffer.name);
      for (Piece& piece : buffer.pieces) piece.tensor = other_name(shared->tensors, piece.tensor);
      std::erase_if(buffer.pieces, [](const Piece& piece) { return piece.tensor.empty(); });
    }
    return all;
  };
  stage.run = [run = stage.run, shared](RankRun& r) {
    RankRun other(r, shared->buffers);
    run(other);
  };
  stage.reference = [reference = stage.reference, shared](const WholeInputs& in) {
    return reference(RenamedInputs(in, shared->tensors));
  };
  if (stage.blind_to) {
    stage.blind_to = [blind_to = stage.blind_to, shared](const WholeInputs& in,
                                                         const std::vector<Budget>& budgets) {
      return blind_to(RenamedInputs(in, shared->tensors), budgets);
    };
  }
  return stage;
}

}  // namespace tp
