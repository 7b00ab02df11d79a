"""PPO against any reference policy."""
