"""What joins the registry besides builds: plain networks, installed packages; and accuracy of any engine."""
