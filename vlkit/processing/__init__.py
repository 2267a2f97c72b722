"""Images to patches, conversations to ids, both to a Batch."""

from vlkit.processing.chat_format import CHAT_FORMATS as CHAT_FORMATS
from vlkit.processing.chat_format import ChatFormat as ChatFormat
from vlkit.processing.chat_format import Turn as Turn
from vlkit.processing.image import pack_images as pack_images
from vlkit.processing.image_reading import ReadRule as ReadRule
from vlkit.processing.image_reading import read_image as read_image
from vlkit.processing.image_rule import ImageRule as ImageRule
from vlkit.processing.image_rule import ResizePlan as ResizePlan
from vlkit.processing.json_tokenizer import JsonTokenizer as JsonTokenizer
from vlkit.processing.labels import LabelRule as LabelRule
from vlkit.processing.processor import Measure as Measure
from vlkit.processing.processor import Processor as Processor
from vlkit.processing.processor_config import ProcessorConfig as ProcessorConfig
from vlkit.processing.template import ChatTemplate as ChatTemplate
from vlkit.processing.template_sandbox import TemplateLimits as TemplateLimits
from vlkit.processing.tiktoken_tokenizer import TiktokenTokenizer as TiktokenTokenizer
from vlkit.processing.tokenizer import ByteTokenizer as ByteTokenizer
from vlkit.processing.tokenizer import Tokenizer as Tokenizer
from vlkit.processing.tokenizer import load_tokenizer as load_tokenizer
from vlkit.processing.video import PackedVideo as PackedVideo
from vlkit.processing.video import pack_video as pack_video
from vlkit.processing.video_rule import Samples as Samples
from vlkit.processing.video_rule import VideoRule as VideoRule
