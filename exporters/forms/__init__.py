"""The forms that torch.onnx or onnxruntime do not take, one file each, in the order in which they are tried on a node.

A form is a function of the editor and one operator: it brings the operator into a form that is taken, which gives the
same, and says whether it changed anything. Its file says what it looks for, why, and which library and version need it.
A new form is a new file, and a line here.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from exporters.forms.attention_in_four_dimensions import in_four_dimensions
from exporters.forms.attention_repeated_heads import repeated_heads
from exporters.forms.attention_row_mask import row_for_every_query
from exporters.forms.attention_then_reshape import copied_in_order
from exporters.forms.complex_parts import on_pairs
from exporters.forms.complex_products import of_real_numbers
from exporters.forms.convolution_per_sample import batch_in_front
from exporters.forms.distances import written_out
from exporters.forms.padded_max_pool import kept_from_fusion
from exporters.forms.projected_lstm import taken_apart
from exporters.forms.rsub_of_integers import promoted
from exporters.forms.split_of_dynamic_size import sliced
from exporters.forms.views import reshaped
from foundation.editor import Editor

Form = Callable[[Editor, fx.Node], bool]

FORMS: tuple[Form, ...] = (
    reshaped,  # first: what it makes of a view is looked at by the next
    copied_in_order,
    kept_from_fusion,
    promoted,
    sliced,
    taken_apart,
    written_out,
    of_real_numbers,
    on_pairs,
    batch_in_front,
    repeated_heads,
    row_for_every_query,
    in_four_dimensions,  # last of those of attention: they look at four dimensions, or at the last two
)
