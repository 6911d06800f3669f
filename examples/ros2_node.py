"""A ROS 2 node: a camera's pictures in, answers and alerts out, the model in the same process.

    python ros2_node.py --ros-args -p bundle:=/path/to/bundle -p alert:="Is there a person now?" \\
        -r image:=/camera/image_raw

    image     sensor_msgs/Image (rgb8, bgr8)   in
    question  std_msgs/String                  in
    answer    std_msgs/String                  out, to each question
    alert     std_msgs/Bool                    out, when what `alert` asks begins and ends

Needs rclpy, sensor_msgs and std_msgs of a ROS 2 distribution, and edge-vlm[ort] in its Python.
"""

import numpy as np
import rclpy
from rclpy.node import Node
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import Image
from std_msgs.msg import Bool, String

from edge_vlm.errors import EdgeVlmError
from edge_vlm_runtime import LoadedBundle
from edge_vlm_runtime.demo.paths import DEMO_BUNDLE
from edge_vlm_runtime.protocol import FrameDropped, ServerEvent
from edge_vlm_runtime.protocol.alerts import AlertCleared, AlertTriggered


def to_rgb(message: Image) -> np.ndarray:
    """u8 [H, W, 3]. Raises ValueError for an encoding that is neither rgb8 nor bgr8."""
    if message.encoding not in ("rgb8", "bgr8"):
        raise ValueError(f"pictures must be rgb8 or bgr8, got {message.encoding}")
    rows = np.frombuffer(message.data, np.uint8).reshape(message.height, message.step)
    rgb = rows[:, : 3 * message.width].reshape(message.height, message.width, 3)
    return np.ascontiguousarray(rgb if message.encoding == "rgb8" else rgb[:, :, ::-1])


class EdgeVlmNode(Node):
    def __init__(self) -> None:
        super().__init__("edge_vlm")
        bundle = self.declare_parameter("bundle", str(DEMO_BUNDLE)).value
        alert = self.declare_parameter("alert", "").value
        self.answers = self.create_publisher(String, "answer", 10)
        self.alerts = self.create_publisher(Bool, "alert", 10)
        self.engines = LoadedBundle.open(bundle)
        # "live": frames faster than 2 a second and those that look like the last are dropped.
        self.session = self.engines.session({"delivery": "live"}, on_event=self.heed)
        if alert:
            self.session.create_alert(alert)
        self.create_subscription(Image, "image", self.see, qos_profile_sensor_data)
        self.create_subscription(String, "question", self.answer, 10)

    def see(self, message: Image) -> None:
        stamp_us = message.header.stamp.sec * 1_000_000 + message.header.stamp.nanosec // 1000
        outcome = self.session.send_frame(to_rgb(message), stamp_us)
        if isinstance(outcome, FrameDropped) and outcome.message is not None:
            self.get_logger().warning(f"a picture was dropped: {outcome.message}")

    def answer(self, message: String) -> None:
        try:
            text = self.session.ask(message.data).shown_text
        except EdgeVlmError as error:
            self.get_logger().error(str(error))
            return
        self.answers.publish(String(data=text))

    def heed(self, event: ServerEvent) -> None:
        if isinstance(event, (AlertTriggered, AlertCleared)):
            self.alerts.publish(Bool(data=isinstance(event, AlertTriggered)))

    def destroy_node(self) -> None:
        self.session.close()
        self.engines.close()
        super().destroy_node()


def main() -> None:
    rclpy.init()
    node = EdgeVlmNode()
    try:
        rclpy.spin(node)
    finally:
        node.destroy_node()
        rclpy.shutdown()


if __name__ == "__main__":
    main()
