"""What a coordinator and a hospital share: the plan, programs kept running, and the ledger of what passed between them."""
