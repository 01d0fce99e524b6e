"""Renders conversations with a tokenizer's chat template and locates the assistant's text.

If a template marks the assistant's text with `{% generation %}`, these marks are used. Any other template is first
rendered with placeholders instead of the turns' texts: the text around them belongs to the template and is the same
for all conversations of this structure. A conversation's text must then equal this frame with the texts inserted. This
is verified to the last character, so short answers are never searched for. If a template rewrites the last answer (for
example, one with reasoning), that answer is everything the template adds to its own generation prompt. If it rewrites
more, or omits a part of the conversation, the conversation is refused.
"""

from finetune_assets.data.chat.rendered import Rendered, Span
from finetune_assets.data.chat.template import ChatTemplate

__all__ = ["ChatTemplate", "Rendered", "Span"]
