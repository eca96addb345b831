import time; t0=time.time(); import wandb,os,shutil
t=time.time(); d="/tmp/wt/c"; shutil.rmtree(d,ignore_errors=True); os.makedirs(d)
r=wandb.init(project="p",mode="offline",dir=d,settings=wandb.Settings(silent=True,console="off",),reinit="create_new")
t1=time.time()
for k in range(60): r.log({"a":k}); time.sleep(.02)
t2=time.time(); r.finish(); print(f"import {t-t0:.2f} init {t1-t:.2f} log60 {t2-t1-1.2:.2f} finish {time.time()-t2:.2f}")
