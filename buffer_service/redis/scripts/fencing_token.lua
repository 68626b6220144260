-- A new learner begins: the token of an older one is no longer valid, its shares are free. Returns the new token.
meta()
call('DEL', K('freshlease'), K('drawn'))
untally('drawn')
return call('HINCRBY', K('meta'), 'epoch', 1)
