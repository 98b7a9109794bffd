"""One example of a task, and its id."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One text, or pair of texts, to classify.

    Attributes:
      id: task/split/language/id, the same in every run.
      text: not empty.
      text_pair: the second text, or None.
      label: index into the task's labels, or −1 without a label; always −1 in a multi-label task.
      language: the language, as the task names it.
      label_set: in a multi-label task, the ascending indices of the text's labels, which may be none; otherwise None,
        and so without labels.
    """

    id: str
    text: str
    text_pair: str | None
    label: int
    language: str
    label_set: tuple[int, ...] | None = None

    @property
    def classes(self) -> tuple[int, ...] | None:
        """The indices of the labels, one in a single-label task; None for an example without a label."""
        return self.label_set if self.label < 0 else (self.label,)


def example_id(task: str, split: str, language: str, number: str) -> str:
    """Return the id of an example: task/split/language/number."""
    return f"{task}/{split}/{language}/{number}"


def item_of(id_: str) -> str:
    """Return what follows task/split/language/ in an example's id, which its translations have too."""
    return id_.split("/", 3)[-1]


def data_set(example: Example) -> str:
    """Return the task/split/language of an example, from its id."""
    return f"{example.id.partition(f'/{example.language}/')[0]}/{example.language}"
