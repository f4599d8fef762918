"""A MuJoCo robot that looks like a ros2_control arm on the ROS 2 graph.

The scene it loads, `scene.xml` and `scene.json`, is described key by key in `robot_bridge/scene.py`.
"""
