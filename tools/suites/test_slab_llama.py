"""transformers' common tests on :class:`slabformer.models.llama.SlabLlamaForCausalLM`; run by `peer_suites.py`."""

from __future__ import annotations

import unittest

from tests.generation.test_utils import GenerationTesterMixin
from tests.test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask
from torch import Tensor

from slabformer.models.llama import (
    SlabLlamaConfig,
    SlabLlamaForCausalLM,
    SlabLlamaForSequenceClassification,
    SlabLlamaModel,
)


class SlabLlamaModelTester:
    """A model small enough for tests, and its inputs."""

    is_training = True

    def __init__(self, parent: unittest.TestCase) -> None:
        self.parent = parent
        self.batch_size, self.seq_length = 4, 7
        self.hidden_size, self.intermediate_size, self.vocab_size = 32, 37, 99
        self.num_hidden_layers, self.num_attention_heads, self.num_key_value_heads = 2, 4, 2
        self.type_sequence_label_size = self.num_labels = 3
        self.pad_token_id = 0

    def get_config(self) -> SlabLlamaConfig:
        """Its configuration."""
        return SlabLlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            num_labels=self.num_labels,
            # In eval mode RepBN of a fresh model only scales: starting at 0, all outputs would be 0. Small weights make
            # attention uniform wherever tokens are, wide ones let outputs grow: 0.1 keeps them near 1, as tests expect.
            norm_start="ones",
            initializer_range=0.1,
            max_position_embeddings=512,
            pad_token_id=self.pad_token_id,
            bos_token_id=1,
            eos_token_id=2,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[SlabLlamaConfig, dict[str, Tensor]]:
        """Configuration and inputs."""
        shape = [self.batch_size, self.seq_length]
        input_ids = ids_tensor(shape, self.vocab_size).clamp(min=3)  # neither padding nor the end
        return self.get_config(), {"input_ids": input_ids, "attention_mask": random_attention_mask(shape)}


class SlabLlamaModelTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    """transformers' tests of every model."""

    all_model_classes = (SlabLlamaModel, SlabLlamaForCausalLM, SlabLlamaForSequenceClassification)
    has_attentions = True
    test_resize_embeddings = True

    def setUp(self) -> None:
        """As transformers' own testers."""
        self.model_tester = SlabLlamaModelTester(self)
