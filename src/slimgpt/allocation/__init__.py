"""How much each block loses: schedules and arithmetic. No model runs in here."""
