-- Begins a new learner epoch: whoever holds an older one is shut out, its shares are free.
meta()
call('DEL', K('freshlease'), K('drawn'))
return call('HINCRBY', K('meta'), 'epoch', 1)
