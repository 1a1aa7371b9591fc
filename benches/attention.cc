namespace tp{}
