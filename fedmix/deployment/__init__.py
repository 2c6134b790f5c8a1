"""What a coordinator and a hospital share when fedmix runs between organisations: plans, ledgers, supervised programs."""
